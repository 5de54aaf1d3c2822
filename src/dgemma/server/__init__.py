"""The HTTP server: OpenAI's endpoints over one model. `run.serve` is what `dgemma serve` calls; `app.create_app` builds
the application alone. Nothing is imported here, since FastAPI takes its time."""
