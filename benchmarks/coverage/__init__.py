"""Which timm models convert, and how well."""
