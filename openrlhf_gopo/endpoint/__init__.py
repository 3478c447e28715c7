"""Clients of HTTP services: chat models behind an OpenAI-compatible API, and plain JSON requests with tries."""

from openrlhf_gopo.endpoint.client import Answer, Endpoint, Usage, request_seed
from openrlhf_gopo.endpoint.post import MAX_BODY, Poster, excerpt

__all__ = ["MAX_BODY", "Answer", "Endpoint", "Poster", "Usage", "excerpt", "request_seed"]
