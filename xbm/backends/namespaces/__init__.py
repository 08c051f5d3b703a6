"""Namespaces of standard names over libraries that neither speak the Array API nor are known to array-api-compat."""
