"""Weighted losses in ms-swift: `swift-wit sft config.yaml`, the same YAML with a `wit:` block."""
