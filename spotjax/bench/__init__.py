"""``spotjax bench``: measures a server that generates text from outside, as its clients see it.

A client only: it knows servers by the OpenAI dialect over HTTP or by Spotjax's own gRPC client, so that any of them can
be measured the same way. What figures mean is as in ``vllm bench serve``; docs/benchmarking.md names every difference.

Pure: ``arrivals``, ``lengths``, ``prompts``, ``workload``, ``sse``, ``openai``, ``statistics``, ``goodput``. Effects:
``http_endpoint``, ``grpc_endpoint``, ``load``, ``machine``, ``plots``.
"""
