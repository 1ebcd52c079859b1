"""Summaries as text, tables, Markdown, HTML, LaTeX and CSV."""
