//! Next hops that are kept resolved: a takeover need not ask for them.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::netif::Netif;

/// Next hops that are kept resolved, and how often.
const WARM_MOST: usize = 4096;
const WARM_INTERVAL: Duration = Duration::from_secs(20);
/// Clients that wait for it, and those that are looked at together.
const QUEUE: usize = 1024;
const AT_ONCE: usize = 256;

/// Says which clients have flows.
#[derive(Debug)]
pub struct Warmer {
    queue: mpsc::Sender<Ipv4Addr>,
    warmed: HashMap<Ipv4Addr, Instant>,
}

/// The other end of a [`Warmer`].
#[derive(Debug)]
pub struct ToWarm(mpsc::Receiver<Ipv4Addr>);

/// A queue of clients.
pub fn warmer() -> (Warmer, ToWarm) {
    let (queue, clients) = mpsc::channel(QUEUE);
    let warmed = HashMap::new();
    (Warmer { queue, warmed }, ToWarm(clients))
}

impl Warmer {
    /// Has the way to a client resolved, unless that was done a moment ago: to wake the other end costs a
    /// thousand times what it costs to look. Never waits.
    pub fn warm(&mut self, client: Ipv4Addr, now: Instant) {
        let fresh = |at: &Instant| now.duration_since(*at) < WARM_INTERVAL;
        if self.warmed.get(&client).is_some_and(fresh) {
            return;
        }
        // When the queue is full others are being warmed; this one is resolved at takeover.
        if self.queue.try_send(client).is_err() {
            return;
        }
        if self.warmed.len() >= WARM_MOST {
            self.warmed.retain(|_, at| fresh(at));
        }
        if self.warmed.len() < WARM_MOST {
            self.warmed.insert(client, now);
        }
    }

    /// Nothing of what was done still holds: the link may have been cut, and the kernel have forgotten it.
    pub fn forget(&mut self) {
        self.warmed.clear();
    }
}

/// Resolves next hops as they are asked for.
pub async fn keep_warm(netif: Netif, mut clients: ToWarm) {
    let mut asked = Vec::with_capacity(AT_ONCE);
    while clients.0.recv_many(&mut asked, AT_ONCE).await > 0 {
        if let Err(error) = netif.forget_unresolved(&asked).await {
            tracing::debug!(%error, "the first packets of a takeover may wait for a second");
        }
        for client in asked.drain(..) {
            if let Err(error) = netif.warm_next_hop(client).await {
                tracing::debug!(%client, %error, "next hop not resolved");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_warmed_again_when_its_time_has_come_and_no_sooner() {
        let (mut warmer, mut asked) = warmer();
        let start = Instant::now();
        let client = Ipv4Addr::new(192, 168, 1, 50);
        for (after, expected) in [(0, true), (1, false), (19_999, false), (20_000, true)] {
            warmer.warm(client, start + Duration::from_millis(after));
            assert_eq!(asked.0.try_recv().is_ok(), expected, "after {after} ms");
        }
        warmer.warm(Ipv4Addr::new(192, 168, 1, 51), start);
        assert!(asked.0.try_recv().is_ok(), "another client");
        warmer.warm(client, start + WARM_INTERVAL);
        assert!(asked.0.try_recv().is_err());
        warmer.forget();
        warmer.warm(client, start + WARM_INTERVAL);
        assert!(asked.0.try_recv().is_ok(), "nothing is known any more");
    }

    #[test]
    fn what_found_no_room_is_asked_for_again_and_memory_is_bounded() {
        let (mut warmer, mut asked) = warmer();
        let now = Instant::now();
        let client = |number: usize| Ipv4Addr::from(0x0a00_0000 + number as u32);
        for number in 0..=QUEUE {
            warmer.warm(client(number), now);
        }
        assert_eq!(asked.0.try_recv(), Ok(client(0)));
        warmer.warm(client(QUEUE), now);
        while asked.0.try_recv().is_ok_and(|found| found != client(QUEUE)) {}
        assert!(asked.0.try_recv().is_err(), "it came once, as the last");
        for number in 0..3 * WARM_MOST {
            warmer.warm(client(number), now);
            asked.0.try_recv().ok();
        }
        assert_eq!(warmer.warmed.len(), WARM_MOST);
    }
}
