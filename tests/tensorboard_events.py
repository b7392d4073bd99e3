"""TensorBoard's files decoded again."""

import struct


def decoded_events(folder):
    """All events of a folder; checks the framing of the records and their checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            length, length_sum = struct.unpack("<QI", data[:12])
            body, (body_sum,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length :][:4])
            assert masked_crc32c(data[:8]) == length_sum and masked_crc32c(body) == body_sum
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def scalars_and_images(events):
    return {(e.step, v.tag): v for e in events for v in e.summary.value}
