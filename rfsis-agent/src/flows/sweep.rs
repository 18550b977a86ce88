//! What time does to flows: timers of live ones, and the end of those that have ended or were given up.

use std::net::Ipv4Addr;

use smoltcp::socket::tcp::State;

use super::{Effects, Flow, Flows, SECOND};
use crate::collections::HashSet;
use crate::heartbeat::Nanos;
use crate::sync::Record;

/// A handshake that is not completed by then was given up by the client (RFC 6298, `tcp_syn_retries`).
pub(super) const OPENING_TIMEOUT: Nanos = 130 * SECOND;

/// How long the last segments of a flow that was closed by both sides may be under way. Handed to the
/// kernel, which knows nothing of the flow, each would be answered by a reset.
pub(super) const LINGER: Nanos = 2 * SECOND;

/// Next hops of clients are refreshed so often.
const WARM: Nanos = 20 * SECOND;

/// How long a closed flow answers late segments (RFC 9293 section 3.10.8, Linux's 60 s).
pub(super) const TIME_WAIT: Nanos = 60 * SECOND;

/// A live flow whose client acknowledges nothing for so long is gone (Linux `tcp_retries2`, 15 min).
const SILENT_CLIENT: Nanos = 924 * SECOND;

/// A live flow whose client does not complete the handshake is given up after this, ns, as by the kernel (five
/// repetitions, `tcp_synack_retries` of tcp(7)).
const HALF_OPEN: Nanos = 63 * SECOND;

impl Flows {
    /// When [`Flows::poll`] and [`Flows::adopt_some`] are due, ns.
    pub fn next_wakeup(&self) -> Nanos {
        let timer = self.timers.first().map_or(Nanos::MAX, |(at, _)| *at);
        let reset = self.resets.front().map_or(Nanos::MAX, |(at, _)| *at);
        let moves = self.moves.next_wakeup();
        timer.min(reset).min(self.next_sweep).min(moves)
    }

    /// Time has passed: timers of live flows, and once a second what has ended is reaped.
    pub fn poll(&mut self, now: Nanos, fx: &mut impl Effects) {
        let now = self.advance(now);
        // A timer that is due again at once waits for the next call, so this ends.
        let mut due = Vec::new();
        while let Some(&(at, flow)) = self.timers.first()
            && at <= now
        {
            self.timers.remove(&(at, flow));
            self.timer_of.remove(&flow);
            due.push(flow);
        }
        for flow in due {
            self.with_shadow(flow, now, fx, |_, _| {});
        }
        while let Some((_, packet)) = self.resets.pop_front_if(|(at, _)| *at <= now) {
            fx.send(&packet);
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SECOND;
            self.sweep(now, fx);
            self.sweep_arrivals(now);
        }
    }

    fn sweep(&mut self, now: Nanos, fx: &mut impl Effects) {
        let idle = self.config.idle_timeout;
        let live = self.live;
        let mut ended = Vec::new();
        for (&flow, entry) in &mut self.flows {
            let quiet = match entry {
                Flow::Unprotected {
                    last_activity,
                    closed,
                    ..
                } => {
                    // Of a flow on a shadow of the active's only the active's half is copied.
                    let patience = if closed.active { LINGER } else { idle };
                    now.saturating_sub(*last_activity) > patience
                }
                Flow::Shadow(shadow) => {
                    shadow.relax();
                    let quiet = now.saturating_sub(shadow.last_activity());
                    (shadow.is_closed() && quiet > LINGER)
                        || quiet > idle
                        || (shadow.state() == State::TimeWait && quiet > TIME_WAIT)
                        || (live && shadow.bytes() > 0 && quiet > SILENT_CLIENT)
                        || (live && shadow.state() == State::SynReceived && quiet > HALF_OPEN)
                }
            };
            if quiet {
                ended.push(flow);
            }
        }
        for flow in ended {
            if live && let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) {
                // The standby may know of it by what it has said.
                let client_isn = shadow.handshake().client_isn;
                self.tells.push(Record::Close { flow, client_isn });
            }
            self.remove(flow, fx);
        }
        if !live && now >= self.next_warm {
            self.next_warm = now + WARM;
            let clients: HashSet<u32> = self.flows.keys().map(|flow| flow.client_addr).collect();
            for client in clients {
                fx.warm(Ipv4Addr::from(client));
            }
        }
        while let Some(&(flow, isn)) = self.opening_order.front() {
            match self.openings.get(&flow) {
                Some(o) if o.client_isn == isn && now.saturating_sub(o.since) < OPENING_TIMEOUT => {
                    break;
                }
                Some(o) if o.client_isn == isn => self.forget_opening(flow, fx),
                _ => {}
            }
            self.opening_order.pop_front();
        }
    }
}
