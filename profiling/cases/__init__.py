"""A case: what is to be measured, and the step that it runs."""
