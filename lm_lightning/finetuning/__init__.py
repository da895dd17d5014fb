"""What the fine-tuning tasks share."""
