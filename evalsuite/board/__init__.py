"""What others see of results: submissions, the leaderboard and reports."""
