//! The heir's kernel sockets that were made from live shadows.

use super::*;

/// A stack of its own, brought to the numbers by a made-up handshake.
pub(crate) struct Adopted {
    pub(crate) flow: FlowKey,
    pub(crate) host: Host,
    pub(crate) server: Server,
}

impl Adopted {
    pub(crate) fn new(numbers: &Numbers, unfinished: Unfinished, now: Nanos) -> Self {
        let Numbers { flow, shifts, .. } = *numbers;
        let mut host = Host::new(VIP, u64::from(flow.client_port), now, false);
        let first = numbers.snd_nxt.wrapping_sub(1);
        host.wanted.insert(flow.client_port, first);
        // smoltcp's shift follows from the size.
        let (client_shift, own_shift) = shifts.unwrap_or((0, 0));
        let buffer = (1 << (15 + own_shift)).max(65_535);
        let ticks = numbers.timestamp.map(|_| active_ticks as fn() -> u32);
        let mut listener = socket(buffer, ticks);
        listener.listen((VIP, flow.service_port)).unwrap();
        let handle = host.sockets.add(listener);
        let bare = bare_repr(flow.client_port, flow.service_port, TcpControl::Syn);
        let syn = TcpRepr {
            seq_number: seq(numbers.rcv_nxt.wrapping_sub(1)),
            window_scale: shifts.map(|_| client_shift),
            max_seg_size: Some(numbers.mss),
            sack_permitted: numbers.sack,
            timestamp: numbers.timestamp.map(|_| TcpTimestampRepr::new(0, 0)),
            ..bare
        };
        let ack = TcpRepr {
            control: TcpControl::None,
            seq_number: seq(numbers.rcv_nxt),
            ack_number: Some(seq(numbers.snd_nxt)),
            window_len: window_field(numbers.snd_wnd, client_shift),
            timestamp: syn.timestamp,
            ..bare
        };
        for segment in [syn, ack] {
            host.receive(&by_hand(&segment, Direction::ToVip));
            host.poll(now);
        }
        assert_eq!(host.socket(handle).state(), State::Established);
        Self {
            flow,
            host,
            server: Server {
                input: unfinished.input,
                ..Server::new(handle, unfinished.handler)
            },
        }
    }
}
