"""The Open Inference Protocol, version 2, under `/v2`: its messages, its tensors, its routes."""
