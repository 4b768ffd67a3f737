"""What report.html is made of: rows, template, style, scripts and the libraries that it carries."""
