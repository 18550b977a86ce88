//! Handshakes that nobody completes: those of a SYN flood, or of clients that have gone.
//!
//! A standby that follows them forgets them in time, and says so. Of those that opened while it was silent only
//! the services know which were completed: the gate has seen no more of them than a SYN-ACK. They end here when
//! the kernel has given them up, or when there is no room for others.

use std::collections::VecDeque;

use rfsis_common::maps::FlowKey;

use super::{Guard, GuardEffects, Phase, SECOND, SWEEP_AT_ONCE};
use crate::heartbeat::Nanos;
use crate::sync::{Open, Record};

/// The kernel gives a handshake up after 63 s (five repetitions, `tcp_synack_retries` of tcp(7)), ns.
const GIVEN_UP: Nanos = 75 * SECOND;

/// So many are forgotten at once where there is no room: a slot must not be used again at once.
const MADE_ROOM: usize = 64;

/// Remembered at the most, for each flow that there may be.
const REMEMBERED: usize = 4;

/// Handshakes in the order in which they began: when, and of which connection.
pub(super) type Handshakes = VecDeque<(Nanos, FlowKey, u32)>;

impl Guard {
    /// A slot that no flow has, if need be that of a handshake. Those that are still to be lent to the gate are not
    /// for the taking.
    pub(super) fn take_slot(&mut self, fx: &mut impl GuardEffects) -> Option<u32> {
        let kept_back = self.to_lend();
        if self.free.len() <= kept_back {
            let mut room = 0;
            while room < MADE_ROOM
                && let Some((_, key, client_isn)) = self.handshakes.pop_front()
            {
                room += usize::from(self.end_if_half_open(key, client_isn, fx));
            }
        }
        if self.free.len() > kept_back {
            self.free.pop_front()
        } else {
            None
        }
    }

    pub(super) fn note_handshake(&mut self, open: &Open, now: Nanos, fx: &mut impl GuardEffects) {
        self.handshakes.push_back((now, open.flow, open.client_isn));
        if self.handshakes.len() > REMEMBERED * self.config.max_flows
            && let Some((_, key, client_isn)) = self.handshakes.pop_front()
        {
            self.end_if_half_open(key, client_isn, fx);
        }
    }

    /// Forgets some of those that the kernel has given up; returns whether there may be more.
    pub(super) fn sweep_handshakes(&mut self, now: Nanos, fx: &mut impl GuardEffects) -> bool {
        let mut looks = 0;
        while looks < SWEEP_AT_ONCE
            && let Some((_, key, client_isn)) = self
                .handshakes
                .pop_front_if(|(since, ..)| now.saturating_sub(*since) > GIVEN_UP)
        {
            looks += usize::from(self.is(&key, client_isn));
            self.end_if_half_open(key, client_isn, fx);
        }
        looks == SWEEP_AT_ONCE
    }

    /// Whether nobody has completed the handshake of a flow.
    pub(super) fn is_half_open(&self, key: FlowKey, fx: &mut impl GuardEffects) -> bool {
        let Some(flow) = self.flows.get(&key) else {
            return false;
        };
        // Its slot still tells of an older flow.
        matches!(flow.phase, Phase::Opening { .. })
            || (!fx.runs(key) && fx.sent(flow.slot).is_some_and(|sent| sent.version == 0))
    }

    fn end_if_half_open(
        &mut self,
        key: FlowKey,
        client_isn: u32,
        fx: &mut impl GuardEffects,
    ) -> bool {
        let ends = self.is(&key, client_isn) && self.is_half_open(key, fx) && self.claim(key, fx);
        if ends {
            if self.is_opening(&key) {
                self.refused += 1;
                self.let_go(key, fx);
            }
            self.records.push(Record::Close {
                flow: key,
                client_isn,
            });
            self.forget(key, fx);
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rfsis_common::ack_gate::OpeningKind;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};

    use super::*;
    use crate::guard::GuardConfig;
    use crate::guard::mock::Maps;
    use crate::wire::{bare_repr, emit_packet};

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const MAX_FLOWS: usize = 100;

    fn key(port: u16) -> FlowKey {
        FlowKey {
            client_addr: CLIENT.into(),
            client_port: port,
            service_port: 7,
        }
    }

    /// The kernel answers a SYN from this port; no standby is there.
    fn opens(guard: &mut Guard, maps: &mut Maps, port: u16, now: Nanos) {
        let mut packet = |from, to, repr: &TcpRepr<'_>, kind| {
            let mut bytes = Vec::new();
            let caps = ChecksumCapabilities::default();
            emit_packet(&mut bytes, from, to, repr, &caps);
            guard.process_opening(&bytes, kind, now, maps);
        };
        let syn = TcpRepr {
            seq_number: TcpSeqNumber(1_000),
            ..bare_repr(port, 7, TcpControl::Syn)
        };
        packet(CLIENT, VIP, &syn, OpeningKind::Syn);
        let answer = TcpRepr {
            seq_number: TcpSeqNumber(5_000),
            ack_number: Some(TcpSeqNumber(1_001)),
            ..bare_repr(7, port, TcpControl::Syn)
        };
        packet(VIP, CLIENT, &answer, OpeningKind::Passed);
    }

    /// An active node without a standby, with a connection of each port below 10 and a full table of handshakes.
    fn flooded() -> (Guard, Maps) {
        let mut guard = Guard::new(GuardConfig {
            vip: VIP,
            timeout: SECOND,
            max_flows: MAX_FLOWS,
            idle_timeout: 7_200 * SECOND,
            copied: true,
        });
        let mut maps = Maps::default();
        guard.go_active(0);
        for port in 0..MAX_FLOWS as u16 {
            opens(&mut guard, &mut maps, port, 0);
        }
        maps.running = Some((0..10).map(key).collect());
        assert_eq!(maps.guarded.len(), MAX_FLOWS);
        (guard, maps)
    }

    fn of_connections(maps: &mut Maps) -> usize {
        let flows: Vec<FlowKey> = maps.guarded.keys().copied().collect();
        flows.into_iter().filter(|flow| maps.runs(*flow)).count()
    }

    #[test]
    fn handshakes_make_room_for_others_and_connections_do_not() {
        let (mut guard, mut maps) = flooded();
        for port in 1_000..1_200 {
            opens(&mut guard, &mut maps, port, SECOND);
            assert!(maps.guarded.contains_key(&key(port)), "{port}");
            assert!(maps.guarded.len() <= MAX_FLOWS);
        }
        assert_eq!((of_connections(&mut maps), guard.census().refused), (10, 0));
        // Where all are connections there is no room.
        maps.running = None;
        while guard.census().exposed < MAX_FLOWS {
            let port = 2_000 + guard.census().exposed as u16;
            opens(&mut guard, &mut maps, port, SECOND);
        }
        opens(&mut guard, &mut maps, 9_000, SECOND);
        assert_eq!(guard.census().refused, 1);
    }

    #[test]
    fn handshakes_end_when_the_kernel_has_given_them_up_and_the_standby_hears_it() {
        let (mut guard, mut maps) = flooded();
        guard.poll(GIVEN_UP, &mut maps);
        assert_eq!(maps.guarded.len(), MAX_FLOWS);
        for tick in 1..10 {
            guard.poll(GIVEN_UP + tick * SECOND, &mut maps);
        }
        assert_eq!((maps.guarded.len(), of_connections(&mut maps)), (10, 10));
        let mut records = Vec::new();
        guard.take_records(&mut records);
        let closed = records.iter().filter(|r| matches!(r, Record::Close { .. }));
        assert_eq!(closed.count(), MAX_FLOWS - 10);
    }

    /// It has said something, so its client has answered: what is left of it ends in another way.
    #[test]
    fn a_connection_that_has_spoken_is_no_handshake() {
        let (guard, mut maps) = flooded();
        assert!(guard.is_half_open(key(50), &mut maps));
        for sent in maps.sent.values_mut() {
            sent.version = 2;
        }
        assert!(!guard.is_half_open(key(50), &mut maps));
    }
}
