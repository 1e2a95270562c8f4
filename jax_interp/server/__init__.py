"""The debugger, records and explanations over HTTP: parses, calls, returns; from `app.create` on."""
