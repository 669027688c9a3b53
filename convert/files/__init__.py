"""Files in and out: safetensors, shards, slices, manifests, torch's archives without unpickling."""
