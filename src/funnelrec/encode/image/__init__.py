"""Pictures to vectors or to the logits of classes: convolutional networks, capsules, contrast."""
