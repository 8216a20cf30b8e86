"""Who calls, what they may do, how much of it. gRPC's interceptor and the HTTP middleware are thin around this."""
