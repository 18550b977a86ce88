//! Gratuitous ARP: tells the LAN where the VIP is now.
//!
//! Both forms, because some hosts heed only one, and more than once, because one is easily lost
//! (RFC 5227 section 3, RFC 5944 section 4.6). Sans-IO: [`Announcer::due`] says when.

use std::net::Ipv4Addr;

use rfsis_common::heartbeat::{ARP_LEN, ETHERNET_LEN};

use crate::heartbeat::{BROADCAST, MacAddr, Nanos};

/// An Ethernet frame with an ARP packet.
pub type ArpFrame = [u8; ETHERNET_LEN + ARP_LEN];

const MILLISECOND: Nanos = 1_000_000;

/// After a takeover, ns from its start.
const REPEATS: [Nanos; 4] = [0, 50 * MILLISECOND, 200 * MILLISECOND, 1000 * MILLISECOND];

/// From then on, ns: a host that was away or whose cache was poisoned finds the VIP again.
const REFRESH: Nanos = 30_000 * MILLISECOND;

/// When to announce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Announcer {
    /// Start of the sequence and announcements made.
    running: Option<(Nanos, usize)>,
}

impl Announcer {
    /// Starts the sequence, anew if it is running.
    pub fn start(&mut self, now: Nanos) {
        self.running = Some((now, 0));
    }

    /// Says nothing more.
    pub fn stop(&mut self) {
        self.running = None;
    }

    /// When the next announcement is due, ns; `Nanos::MAX` if none is.
    pub fn next_wakeup(&self) -> Nanos {
        let Some((start, made)) = self.running else {
            return Nanos::MAX;
        };
        match REPEATS.get(made) {
            Some(offset) => start + offset,
            None => start + REPEATS[3] + REFRESH * (made - REPEATS.len() + 1) as Nanos,
        }
    }

    /// Whether to announce now. Counts it as made.
    pub fn due(&mut self, now: Nanos) -> bool {
        let due = self.next_wakeup() <= now;
        if due && let Some((_, made)) = &mut self.running {
            *made += 1;
        }
        due
    }
}

/// The request form and the reply form, as broadcasts from `mac`.
pub fn frames(vip: Ipv4Addr, mac: MacAddr) -> [ArpFrame; 2] {
    [frame(1, vip, mac, [0; 6]), frame(2, vip, mac, BROADCAST)]
}

/// RFC 826: sender and target protocol address are both the VIP.
fn frame(operation: u8, vip: Ipv4Addr, mac: MacAddr, target: MacAddr) -> ArpFrame {
    let mut frame = [0; ETHERNET_LEN + ARP_LEN];
    frame[0..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    // Ethernet, IPv4, address lengths 6 and 4, operation.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&vip.octets());
    frame[32..38].copy_from_slice(&target);
    frame[38..42].copy_from_slice(&vip.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_repeat_and_are_refreshed() {
        let mut announcer = Announcer::default();
        assert_eq!(announcer.next_wakeup(), Nanos::MAX);
        let start = 7_000_000_000;
        announcer.start(start);
        let mut made = Vec::new();
        for _ in 0..6 {
            let at = announcer.next_wakeup();
            assert!(!announcer.due(at - 1));
            assert!(announcer.due(at));
            made.push((at - start) / MILLISECOND);
        }
        assert_eq!(made, [0, 50, 200, 1000, 31_000, 61_000]);
        announcer.stop();
        assert!(!announcer.due(Nanos::MAX - 1));
    }

    #[test]
    fn both_forms_claim_the_vip_with_the_own_hardware_address() {
        let vip = Ipv4Addr::new(192, 168, 1, 100);
        let [request, reply] = frames(vip, [2, 0, 0, 0, 0, 9]);
        for (frame, operation) in [(request, 1), (reply, 2)] {
            assert_eq!(frame[21], operation);
            assert_eq!(frame[6..12], [2, 0, 0, 0, 0, 9]);
            assert_eq!(frame[22..28], [2, 0, 0, 0, 0, 9]);
            assert_eq!(
                (&frame[28..32], &frame[38..42]),
                (&vip.octets()[..], &vip.octets()[..])
            );
        }
    }
}
