"""The wire: decode, call, encode; errors to status in one table. The one place with stubs."""
