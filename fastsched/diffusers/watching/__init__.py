"""What a pipeline does at each step: its networks' calls are recorded, and compared between steps."""
