"""What a compression run tells of itself: its record, the HTML page and the model card."""
