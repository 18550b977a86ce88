//! A SYN flood: somebody on the LAN opens connections to the VIP that are never completed.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{PacketBuilder, TcpOptionElement};

use crate::agent::port;
use crate::lab::{Host, Lab, VIP};
use crate::patience::{PATIENCE, slowed};
use crate::wire::Wire;

/// Where the SYNs say that they come from: the upper half of the LAN, where nobody is. The client answers ARP
/// requests for it and ignores the SYN-ACKs, so that each half-open connection is one for as long as can be.
const SOURCES: &str = "192.168.1.128/25";
const FIRST_SOURCE: u8 = 129;
const LAST_SOURCE: u8 = 254;

/// SYNs that are sent without a pause in between.
const BURST: u64 = 100;

/// A flood under way, from the client's namespace. No source sends two SYNs from the same port.
#[derive(Debug)]
pub struct Flood {
    sent: Arc<AtomicU64>,
    target: Arc<AtomicU8>,
    sender: JoinHandle<Result<()>>,
}

impl Flood {
    /// Sends `count` SYNs at this rate to the host that has the VIP.
    ///
    /// # Errors
    /// When the client cannot be prepared.
    pub fn start(lab: &Lab, target: Host, count: u64, per_second: u64) -> Result<Self> {
        let client = lab.client();
        client.sh(&format!("ip route add local {SOURCES} dev lo"))?;
        client.sh("nft add table ip flood")?;
        client.sh("nft add chain ip flood in { type filter hook prerouting priority -300 ; }")?;
        client.sh(&format!(
            "nft add rule ip flood in ip saddr {VIP} ip daddr {SOURCES} drop"
        ))?;
        let wire = Wire::open(client)?;
        let sent = Arc::new(AtomicU64::new(0));
        let aim = Arc::new(AtomicU8::new(last_byte(target)));
        let (counted, aimed) = (Arc::clone(&sent), Arc::clone(&aim));
        let sender = std::thread::spawn(move || {
            let (mut due, end) = (Instant::now(), Instant::now() + 10 * slowed(PATIENCE));
            let pause = Duration::from_secs(1) * BURST as u32 / per_second as u32;
            for number in 0..count {
                // A cable without a queue refuses what comes too fast.
                while wire
                    .send(&syn(number, aimed.load(Ordering::Relaxed)))
                    .is_err()
                {
                    ensure!(Instant::now() < end, "the cable takes nothing");
                    std::thread::sleep(Duration::from_millis(1));
                }
                counted.fetch_add(1, Ordering::Relaxed);
                if number % BURST == 0 {
                    due += pause;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            }
            Ok(())
        });
        Ok(Self {
            sent,
            target: aim,
            sender,
        })
    }

    /// The VIP has moved.
    pub fn aim(&self, target: Host) {
        self.target.store(last_byte(target), Ordering::Relaxed);
    }

    /// SYNs so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until all are sent.
    ///
    /// # Errors
    /// When the sender failed.
    pub fn finish(self) -> Result<u64> {
        self.sender.join().ok().context("the sender panicked")??;
        Ok(self.sent.load(Ordering::Relaxed))
    }
}

fn last_byte(host: Host) -> u8 {
    host.mac()[5]
}

fn syn(number: u64, target: u8) -> Vec<u8> {
    let sources = u64::from(LAST_SOURCE - FIRST_SOURCE) + 1;
    let source = Ipv4Addr::new(192, 168, 1, FIRST_SOURCE + (number % sources) as u8);
    let source_port = 1024 + (number / sources) as u16;
    let isn = (number as u32).wrapping_mul(0x9e37_79b9);
    let options = [
        TcpOptionElement::MaximumSegmentSize(1460),
        TcpOptionElement::SelectiveAcknowledgementPermitted,
        TcpOptionElement::Timestamp(number as u32 + 1, 0),
        TcpOptionElement::WindowScale(7),
    ];
    let builder = PacketBuilder::ethernet2(Host::Client.mac(), [2, 0, 0, 0, 0, target])
        .ipv4(source.octets(), VIP.octets(), 64)
        .tcp(source_port, port::ECHO, isn, 64_240)
        .syn();
    let mut frame = Vec::new();
    // The options fit, and writing to a vector cannot fail.
    if let Ok(builder) = builder.options(&options) {
        builder.write(&mut frame, &[]).ok();
    }
    frame
}
