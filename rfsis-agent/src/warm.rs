//! Next hops that are kept resolved: a takeover need not ask for them.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::netif::Netif;

/// Next hops that are kept resolved, and how often.
const WARM_MOST: usize = 4096;
const WARM_INTERVAL: Duration = Duration::from_secs(20);

/// Keeps next hops resolved while their flows are young, so that a takeover need not ask for them.
pub async fn keep_warm(netif: Netif, mut clients: mpsc::Receiver<Ipv4Addr>) {
    let mut warmed: HashMap<Ipv4Addr, Instant> = HashMap::new();
    while let Some(client) = clients.recv().await {
        let now = Instant::now();
        if warmed
            .get(&client)
            .is_some_and(|at| now - *at < WARM_INTERVAL)
        {
            continue;
        }
        if warmed.len() >= WARM_MOST {
            warmed.retain(|_, at| now - *at < WARM_INTERVAL);
        }
        if warmed.len() < WARM_MOST {
            warmed.insert(client, now);
        }
        if let Err(error) = netif.warm_next_hop(client).await {
            tracing::debug!(%client, %error, "next hop not resolved");
        }
    }
}
