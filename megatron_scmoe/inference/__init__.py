"""Text from a trained model: its options and weights from a checkpoint, tokens one by one."""
