//! The node takes over, or is standby again: which flows go on, and who is told that theirs does not.

use std::cmp::Reverse;

use rfsis_common::frame::tcp_flags;
use rfsis_common::maps::HeldEvent;
use smoltcp::socket::tcp::State;

use super::{Effects, Flow, Flows, SECOND, TakeoverReport, is_exposed};
use crate::collections::HashMap;
use crate::heartbeat::Nanos;
use crate::lockstep::before;
use crate::metrics::ResetReason;
use crate::shadow::{Shadow, probe_packet, reset_packet};

/// A reset is sent at takeover and again after these times, ns: no client answers it, so nobody knows
/// whether it was lost, and a client that only waits would wait for good.
const RESET_AGAIN: [Nanos; 2] = [200_000_000, SECOND];

impl Flows {
    /// The active may have opened its gate without this node's hearing of it.
    pub fn expose(&mut self) {
        for entry in self.flows.values_mut() {
            if let Flow::Shadow(shadow) = entry {
                shadow.expose();
            }
        }
    }

    /// The node has taken over: every shadow that can goes live, the others' clients are told.
    /// Call after every frame that was mirrored before has been processed.
    pub fn go_live(&mut self, now: Nanos, fx: &mut impl Effects) -> TakeoverReport {
        let now = self.advance(now);
        self.live = true;
        self.drop_arrivals();
        let mut report = TakeoverReport {
            unanswered: self.adopt_openings(now, fx),
            ..TakeoverReport::default()
        };
        let mut resets: HashMap<ResetReason, usize> = HashMap::default();
        let mut doomed = Vec::new();
        let mut speakers = Vec::new();
        for (&flow, entry) in &mut self.flows {
            match entry {
                Flow::Unprotected { closed, .. } if closed.both() => {}
                Flow::Unprotected {
                    client_ack,
                    client_next,
                    sent,
                    ..
                } => {
                    // Either number may be the exact one. If none is, the client answers the last packet,
                    // and the kernel knows from the answer how to reset it.
                    let vip = self.config.vip;
                    let beyond =
                        sent.filter(|sent| client_ack.is_none_or(|ack| before(ack, *sent)));
                    let numbers = client_ack.iter().copied().chain(beyond);
                    let resets = numbers.map(|seq| reset_packet(flow, vip, seq, None));
                    let known = client_ack.or(*sent).zip(*client_next);
                    let probe = known.map(|(seq, ack)| probe_packet(flow, vip, seq, ack));
                    let packets = resets.chain(probe).collect();
                    doomed.push((
                        flow,
                        ResetReason::Unprotected,
                        packets,
                        client_next.is_some(),
                    ));
                }
                Flow::Shadow(shadow) if shadow.is_closed() => {}
                Flow::Shadow(shadow) if is_exposed(&self.config, shadow) => {
                    let packets = shadow.last_words();
                    doomed.push((flow, ResetReason::Unprotected, packets, true));
                }
                Flow::Shadow(shadow) => match shadow.fate() {
                    Err(reason) => doomed.push((flow, reason, shadow.last_words(), true)),
                    Ok(()) => {
                        report.live += 1;
                        let before = shadow.bytes();
                        self.moves.add(flow, now);
                        if shadow.go_live(now) {
                            let half_open = shadow.state() == State::SynReceived;
                            speakers.push((half_open, Reverse(shadow.last_activity()), flow));
                        }
                        self.bytes -= before - shadow.bytes();
                    }
                },
            }
        }
        // Most recently active first; but of half-open ones a SYN flood makes as many as it likes.
        speakers.sort_unstable();
        report.spoke = speakers.len();
        for (.., flow) in speakers {
            self.with_shadow(flow, now, fx, Shadow::resume);
        }
        let mut told = Vec::new();
        for (flow, reason, packets, heard) in doomed {
            *resets.entry(reason).or_default() += 1;
            // The kernel answers whatever the client sends next: let that pass as well.
            fx.approve(flow);
            for packet in packets {
                fx.send(&packet);
                // Whoever was never heard may still be opening its connection, and then the kernel has it.
                if heard {
                    told.push(packet);
                }
            }
            self.remove(flow, fx);
        }
        for pause in RESET_AGAIN {
            let again = told.iter().map(|packet| (now + pause, packet.clone()));
            self.resets.extend(again);
        }
        report.resets = resets.into_iter().collect();
        report
    }

    /// The node is standby again: what lived here belongs to an epoch that is over.
    pub fn go_standby(&mut self, fx: &mut impl Effects) {
        self.live = false;
        self.drop_arrivals();
        self.timers.clear();
        self.timer_of.clear();
        self.opening_order.clear();
        self.resets.clear();
        self.moves.clear();
        self.touched.clear();
        self.tells.clear();
        self.bytes = 0;
        let openings = std::mem::take(&mut self.openings);
        let flows = std::mem::take(&mut self.flows);
        for flow in openings.into_keys().chain(flows.into_keys()) {
            fx.release(flow);
        }
    }

    /// The gate held back a FIN or RST of the kernel's. The agent is alive, so it is no crash that
    /// speaks: unless the flow lives on a shadow here, let it go.
    ///
    /// Returns whether it was let go.
    pub fn process_held(&mut self, held: &HeldEvent, fx: &mut impl Effects) -> bool {
        let flow = held.flow;
        if !self.live || self.flows.contains_key(&flow) {
            return false;
        }
        fx.approve(flow);
        let flags = held.flags as u8;
        if flags & tcp_flags::RST != 0 {
            // The kernel repeats a FIN, never an RST.
            let ack = (flags & tcp_flags::ACK != 0).then_some(held.ack);
            fx.send(&reset_packet(flow, self.config.vip, held.seq, ack));
        }
        true
    }
}
