"""Array API namespaces for libraries that neither implement the standard nor are supported by array-api-compat."""
