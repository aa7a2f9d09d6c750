"""Passes that leave things out: zeros that leave the shapes, and what makes zeros."""
