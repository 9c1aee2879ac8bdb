"""Finished runs to tables and pages."""
