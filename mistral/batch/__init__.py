"""Batch jobs: files of requests in, files of answers out, in OpenAI's batch format. Sits on serve."""
