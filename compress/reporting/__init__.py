"""What a run says at its end: tables for the terminal and report.md, a page with figures."""
