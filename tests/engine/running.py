"""Run requests through an engine to their end."""


def generate(engine, requests, between=None):
    """Tokens of every sample, and what the caches gave for each request.

    Args:
        between: called after every step with its number; may add and cancel other requests.
    """
    ids = [engine.add(request) for request in requests]
    tokens = {
        request_id: [[] for _ in range(request.sampling.num_samples)] for request_id, request in zip(ids, requests)
    }
    found = dict.fromkeys(ids, 0)
    steps = 0
    while not engine.is_idle:
        steps += 1
        assert steps < 5000
        for event in engine.step():
            if event.request_id in tokens:
                tokens[event.request_id][event.sample].append(event.token_id)
                if event.sample == 0:
                    found[event.request_id] = max(found[event.request_id], event.found_tokens)
        if between:
            between(steps)
    return [tokens[request_id] for request_id in ids], [found[request_id] for request_id in ids]
