"""Code that the fine-tuning tasks share: tables, labelled data, results."""
