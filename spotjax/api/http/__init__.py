"""HTTP beside gRPC: OpenAI's interface, health and whatever browsers and monitoring ask for."""
