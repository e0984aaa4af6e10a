"""What stands behind the page: requests, their limits, the gallery."""
