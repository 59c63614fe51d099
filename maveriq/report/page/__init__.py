"""The HTML report: what stands on a page as data, and one template that shows it."""
