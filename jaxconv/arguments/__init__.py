"""What users give: arguments checked, and errors that say what is wrong with them."""
