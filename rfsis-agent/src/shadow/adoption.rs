//! When a live shadow can become a kernel socket, and with which numbers.
//!
//! The kernel ignores an acknowledgement of what it did not send, for good. So all that the old active can
//! have sent must be settled first: the client has said what it has got since everything from there must
//! have arrived, and has acknowledged all that was written here. Where a handler always writes more it rests
//! meanwhile.

use smoltcp::iface::SocketSet;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber, TcpTimestampRepr};

use super::memory::Lent;
use super::{Context, Outgoing, Shadow, Source};
use crate::adopt::{Numbers, Unfinished};
use crate::heartbeat::Nanos;
use crate::lockstep::{before, distance, later, window_field};
use crate::wire::{bare_repr, emit_packet};

/// What the old active sent has arrived so long after the takeover, or two round trips if that is longer, ns.
const SETTLED: Nanos = 200_000_000;

/// Of a client that announced none (RFC 9293 section 3.7.1), bytes.
const DEFAULT_MSS: u16 = 536;

/// What a shadow lacks to become a kernel socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Nothing.
    Ready,
    /// Time, until then (ns).
    Unsettled(Nanos),
    /// Word of the client what it has got: it is to be asked.
    Unheard,
    /// The same where it is asked by what is repeated, the end of the handshake, bytes before a hole, or those
    /// that the active has answered: the client is to send them.
    Incomplete,
    /// The client's acknowledgement of what was written.
    Unacknowledged,
    /// Time enough: it is closing, and ends here.
    Ending,
}

/// The buffers of a shadow that is done with, to be dropped when there is time.
pub struct Shell {
    _sockets: SocketSet<'static>,
    _memory: Lent,
}

impl std::fmt::Debug for Shell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shell")
    }
}

impl Shadow {
    fn settled_at(&self) -> Nanos {
        self.live_since + SETTLED.max(2 * self.tail.round_trip())
    }

    /// The client has said, in a segment that can be believed, what it has got.
    pub(super) fn note_exact(&mut self, now: Nanos) {
        self.exact |= self.live && now >= self.settled_at();
    }

    /// What this live shadow lacks to become a kernel socket.
    pub fn readiness(&self, now: Nanos) -> Readiness {
        let open = matches!(self.state(), State::Established | State::SynReceived);
        let runs = matches!(self.source, Source::Handler(_));
        if !open || !runs || self.closed_output || self.fin_at.is_some() || self.reset {
            Readiness::Ending
        } else if now < self.settled_at() {
            Readiness::Unsettled(self.settled_at())
        } else if self.state() == State::SynReceived {
            Readiness::Incomplete
        } else if (!self.exact || self.is_behind()) && self.una == self.max() {
            Readiness::Unheard
        } else if !self.exact
            || self.is_behind()
            || self.reorder.is_held_behind(self.held)
            || self.ahead.is_some()
            || self.claimed.is_some()
            || before(self.max(), self.active_next)
        {
            Readiness::Incomplete
        } else if self.una == self.max() {
            Readiness::Ready
        } else {
            Readiness::Unacknowledged
        }
    }

    /// The handler rests until [`Shadow::wake`], so that what is unacknowledged comes to an end.
    pub fn rest(&mut self) {
        self.resting = true;
    }

    /// Whether the handler rests.
    pub fn is_resting(&self) -> bool {
        self.resting
    }

    /// Whether the handler rests, and needs to no longer.
    pub fn has_rested(&self) -> bool {
        self.resting && self.una == self.max()
    }

    /// The handler goes on here.
    pub fn wake(&mut self, cx: &mut Context<'_>) {
        self.resting = false;
        self.pump(&[], cx);
    }

    /// How far the client has acknowledged.
    pub fn acknowledged(&self) -> u32 {
        self.una
    }

    /// What the client knows that it may send, bytes.
    fn promised(&self) -> u32 {
        self.open_window(later(self.window_end, self.active_edge))
    }

    /// Asks the client what it has got: a keep-alive (RFC 9293 section 3.8.4) has always an answer.
    pub fn ask(&mut self, cx: &mut Context<'_>) {
        let shift = self.handshake.shifts().map_or(0, |(_, active)| active);
        let window = self.promised();
        let repr = TcpRepr {
            seq_number: TcpSeqNumber(self.una.wrapping_sub(1) as i32),
            ack_number: Some(TcpSeqNumber(self.held_next() as i32)),
            window_len: window_field(window, shift),
            timestamp: self
                .clock
                .map(|clock| TcpTimestampRepr::new(clock.read(cx.now), self.client_tsval)),
            ..bare_repr(
                self.flow.service_port,
                self.flow.client_port,
                TcpControl::None,
            )
        };
        let mut packet = Vec::new();
        let client = self.flow.client_addr.into();
        let caps = ChecksumCapabilities::default();
        emit_packet(&mut packet, self.vip, client, &repr, &caps);
        cx.out.push(Outgoing {
            packet,
            closes: false,
        });
    }

    /// With what a kernel socket goes on, if this shadow is ready.
    pub fn numbers(&self, now: Nanos) -> Numbers {
        Numbers {
            flow: self.flow,
            vip: self.vip,
            snd_nxt: self.una,
            rcv_nxt: self.held_next(),
            snd_wnd: distance(self.una, self.client_edge).max(0) as u32,
            rcv_wnd: self.promised(),
            mss: self.handshake.client.mss.unwrap_or(DEFAULT_MSS),
            shifts: self.handshake.shifts(),
            sack: self.handshake.sack(),
            timestamp: self.clock.map(|clock| (clock.read(now), self.client_tsval)),
        }
    }

    /// What the kernel socket's service goes on with, and what is left. `None` if there is no handler: it was
    /// not ready.
    pub fn unfinished(mut self) -> Option<(Unfinished, Shell)> {
        let promised = self.promised() as usize;
        let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
        let mut input = Vec::with_capacity((self.held - self.taken) as usize + socket.recv_queue());
        // Its ring may come in two pieces.
        while socket.recv_queue() > 0 {
            let taken = socket.recv(|data| {
                input.extend_from_slice(data);
                (data.len(), data.len())
            });
            if taken.is_err() {
                return None;
            }
        }
        while let Some((start, data)) = self.reorder.pop_until(self.taken) {
            let known = (self.taken - start).min(data.len() as u64) as usize;
            input.extend_from_slice(&data[known..]);
            self.taken += (data.len() - known) as u64;
        }
        match self.source {
            Source::Handler(handler) => Some((
                Unfinished {
                    handler,
                    input,
                    promised,
                },
                Shell {
                    _sockets: self.sockets,
                    _memory: self.memory,
                },
            )),
            Source::Active { .. } => None,
        }
    }
}
