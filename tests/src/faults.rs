//! Faults of the LAN between the nodes: frames of one kind that are lost, doubled or late. Done by
//! nftables at the bridge's ports, so nothing on a host knows of it.
//!
//! ```text
//!   from node a ──► to-a ──┬── lost
//!                          ├── doubled ──────────────► to-b ──► to node b
//!                          ├── late ──► detour ──────►   ▲
//!                          └── else ──► br0 ─────────────┘
//! ```

use anyhow::Result;
use rfsis_common::heartbeat::{ARP_LEN, MAGIC};

use crate::lab::{Host, Lab, VIP};

/// The sync channel's port in every lab: the default.
pub const SYNC_PORT: u16 = 9501;

/// Frames that a fault may strike. Node a is the active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Traffic {
    /// Copies of the VIP's frames that node a makes for node b.
    Copies,
    /// What node a says to node b on the sync channel.
    Openings,
    /// What node b says to node a there.
    Confirmations,
    /// What node a says to the client from the VIP.
    Answers,
    /// Heartbeats of node a.
    HeartbeatsOfA,
    /// Heartbeats of node b.
    HeartbeatsOfB,
    /// Whatever node a sends to node b, but for broadcasts.
    AllToB,
    /// Whatever node b sends to node a, but for broadcasts.
    AllToA,
}

impl Traffic {
    /// All kinds.
    pub const ALL: [Traffic; 8] = [
        Traffic::Copies,
        Traffic::Openings,
        Traffic::Confirmations,
        Traffic::Answers,
        Traffic::HeartbeatsOfA,
        Traffic::HeartbeatsOfB,
        Traffic::AllToB,
        Traffic::AllToA,
    ];

    const fn name(self) -> &'static str {
        match self {
            Traffic::Copies => "copies",
            Traffic::Openings => "openings",
            Traffic::Confirmations => "confirmations",
            Traffic::Answers => "answers",
            Traffic::HeartbeatsOfA => "heartbeats-of-a",
            Traffic::HeartbeatsOfB => "heartbeats-of-b",
            Traffic::AllToB => "all-to-b",
            Traffic::AllToA => "all-to-a",
        }
    }

    const fn way(self) -> (Host, Host) {
        match self {
            Traffic::Copies | Traffic::Openings | Traffic::HeartbeatsOfA | Traffic::AllToB => {
                (Host::A, Host::B)
            }
            Traffic::Confirmations | Traffic::HeartbeatsOfB | Traffic::AllToA => (Host::B, Host::A),
            Traffic::Answers => (Host::A, Host::Client),
        }
    }

    /// As nftables matches them.
    fn matches(self) -> String {
        let (from, to) = self.way();
        let macs = format!(
            "ether saddr {} ether daddr {}",
            from.mac_text(),
            to.mac_text()
        );
        let rest = match self {
            // Whoever sent the original, it was not node a by its own address.
            Traffic::Copies => format!("ip saddr != {}", from.address()),
            Traffic::Openings | Traffic::Confirmations => format!(
                "ip saddr {} ip daddr {} udp dport {SYNC_PORT}",
                from.address(),
                to.address()
            ),
            Traffic::Answers => format!("ip saddr {VIP}"),
            Traffic::HeartbeatsOfA | Traffic::HeartbeatsOfB => {
                // To the peer or to all, as long as it is not known. The magic is behind the ARP packet.
                let from = from.mac_text();
                let (at, magic) = (8 * ARP_LEN, u32::from_be_bytes(MAGIC));
                return format!("ether saddr {from} ether type arp @nh,{at},32 {magic:#x}");
            }
            Traffic::AllToB | Traffic::AllToA => String::new(),
        };
        format!("{macs} {rest}")
    }
}

/// What happens to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Harm {
    /// It is lost.
    Lost,
    /// It comes twice.
    Doubled,
    /// Others that were sent after it come before it.
    Late,
}

/// Strikes frames at random, and with 100 % all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// Which frames.
    pub traffic: Traffic,
    /// What happens to those that are struck.
    pub harm: Harm,
    /// How many are struck, of a hundred.
    pub percent: u32,
}

impl Fault {
    /// Loses so many of a hundred.
    pub const fn loses(traffic: Traffic, percent: u32) -> Self {
        Self {
            traffic,
            harm: Harm::Lost,
            percent,
        }
    }

    /// Doubles so many of a hundred.
    pub const fn doubles(traffic: Traffic, percent: u32) -> Self {
        Self {
            traffic,
            harm: Harm::Doubled,
            percent,
        }
    }

    /// Delays so many of a hundred.
    pub const fn delays(traffic: Traffic, percent: u32) -> Self {
        Self {
            traffic,
            harm: Harm::Late,
            percent,
        }
    }

    fn counter(&self) -> String {
        let harm = match self.harm {
            Harm::Lost => "lost",
            Harm::Doubled => "doubled",
            Harm::Late => "late",
        };
        format!("{}-{harm}", self.traffic.name())
    }

    fn rule(&self) -> String {
        let (_, to) = self.traffic.way();
        let verdict = match self.harm {
            Harm::Lost => "drop".to_owned(),
            Harm::Doubled => format!("dup to \"{}\"", to.port()),
            Harm::Late => format!("fwd to \"{DETOUR}\""),
        };
        // nftables refuses a comparison that is always true.
        let dice = match self.percent {
            100.. => String::new(),
            percent => format!("numgen random mod 100 < {percent}"),
        };
        let (matches, counter) = (self.traffic.matches(), self.counter());
        format!("{matches} {dice} counter name \"{counter}\" {verdict}")
    }
}

/// A veth pair beside the bridge: in at the one end, slowly, and out of the other to the right port.
const DETOUR: &str = "detour";
const DETOUR_END: &str = "detour-end";

impl Lab {
    /// From now on the LAN has these faults and no others.
    ///
    /// # Panics
    /// When nftables refuses, or the kernel lacks it.
    pub fn suffer(&self, faults: &[Fault]) {
        if let Err(error) = self.try_suffer(faults) {
            panic!("cannot make {faults:?}: {error:#}");
        }
    }

    fn try_suffer(&self, faults: &[Fault]) -> Result<()> {
        let bridge = self.bridge();
        let late = faults.iter().any(|fault| fault.harm == Harm::Late);
        if late && bridge.sh(&format!("ip link show {DETOUR}")).is_err() {
            bridge.sh(&format!(
                "ip link add {DETOUR} type veth peer name {DETOUR_END}"
            ))?;
            // At 20 Mbit/s a frame of 1,500 bytes waits 0.6 ms for each that took the way before it.
            bridge.sh(&format!(
                "tc qdisc add dev {DETOUR} root tbf rate 20mbit burst 1600 limit 1mb"
            ))?;
            for end in [DETOUR, DETOUR_END] {
                bridge.sh(&format!("ip link set {end} up"))?;
            }
        }
        // One transaction: no frame gets through between the old faults and the new.
        let mut table = "add table netdev faults\ndelete table netdev faults\n\
                         table netdev faults {\n"
            .to_owned();
        for fault in faults {
            table += &format!("counter {} {{ }}\n", fault.counter());
        }
        for host in Host::ALL {
            let struck = faults.iter().filter(|fault| fault.traffic.way().0 == host);
            let rules: Vec<String> = struck.map(Fault::rule).collect();
            table += &chain(host.port(), &rules);
        }
        if late {
            let onward =
                |host: Host| format!("ether daddr {} fwd to \"{}\"", host.mac_text(), host.port());
            table += &chain(DETOUR_END, &Host::ALL.map(onward));
        }
        table += "}\n";
        let file = self.directory().join("faults.nft");
        std::fs::write(&file, table)?;
        bridge.sh(&format!("nft -f {}", file.display()))?;
        Ok(())
    }

    /// From now on the LAN has no fault.
    ///
    /// # Panics
    /// As [`Lab::suffer`].
    pub fn heal(&self) {
        self.suffer(&[]);
    }

    /// How many frames a fault has struck since it was last made.
    ///
    /// # Panics
    /// When the LAN does not have it.
    pub fn struck(&self, fault: Fault) -> u64 {
        let line = format!("nft list counter netdev faults {}", fault.counter());
        let listed = self.bridge().sh(&line);
        let packets = listed.as_ref().ok().and_then(|text| {
            let mut words = text.split_whitespace();
            words.find(|&word| word == "packets")?;
            words.next()?.parse().ok()
        });
        packets.unwrap_or_else(|| panic!("`{line}`: {listed:?}"))
    }
}

fn chain(device: &str, rules: &[String]) -> String {
    format!(
        "chain at-{device} {{\n\
         type filter hook ingress device \"{device}\" priority 0; policy accept;\n\
         {}\n}}\n",
        rules.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::{PATIENCE, slowed};
    use crate::wire::Wire;
    use etherparse::PacketBuilder;

    const COUNT: usize = 100;

    /// A copy as node a makes it, with a number as its last byte.
    fn copy(number: usize) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(Host::A.mac(), Host::B.mac())
            .ipv4(Host::Client.address().octets(), VIP.octets(), 64)
            .tcp(40_000, 7, 1, 1000)
            .write(&mut frame, &[number as u8; 400])
            .unwrap();
        frame
    }

    /// Sends numbered copies through a lab with this fault, and then a frame that nothing strikes. Returns
    /// the numbers that came, at least so many, and how many were struck.
    fn arrivals(fault: Fault, least: usize) -> (Vec<usize>, usize) {
        let lab = Lab::new();
        lab.suffer(&[fault]);
        let [from, to] = [Host::A, Host::B].map(|host| Wire::open(lab.host(host)).unwrap());
        for number in 0..COUNT {
            from.send(&copy(number)).unwrap();
        }
        let mut last = copy(0);
        // An EtherType for local experiments instead of IPv4's.
        last[12..14].copy_from_slice(&[0x88, 0xb5]);
        from.send(&last).unwrap();
        let (mut numbers, mut over) = (Vec::new(), false);
        let heard = to.hear(slowed(PATIENCE), |frame| {
            over |= frame == last;
            if frame.len() == last.len() && frame[..14] == copy(0)[..14] {
                numbers.extend(frame.last().map(|&number| usize::from(number)));
            }
            (over && numbers.len() >= least).then_some(())
        });
        assert_eq!(heard.unwrap(), Some(()), "{numbers:?}");
        (numbers, lab.struck(fault) as usize)
    }

    #[test]
    fn a_lossy_lan_loses_some_and_a_deaf_one_all() {
        let (numbers, struck) = arrivals(Fault::loses(Traffic::Copies, 50), 0);
        assert_eq!(numbers.len() + struck, COUNT);
        assert!(struck > 0 && !numbers.is_empty(), "{numbers:?}");
        let (numbers, struck) = arrivals(Fault::loses(Traffic::Copies, 100), 0);
        assert_eq!((numbers, struck), (vec![], COUNT));
    }

    #[test]
    fn doubled_frames_come_twice() {
        let (mut numbers, struck) = arrivals(Fault::doubles(Traffic::Copies, 100), 2 * COUNT);
        assert_eq!((numbers.len(), struck), (2 * COUNT, COUNT));
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), COUNT);
    }

    #[test]
    fn late_frames_come_behind_later_ones_and_none_is_lost() {
        let (mut numbers, _) = arrivals(Fault::delays(Traffic::Copies, 50), COUNT);
        assert!(!numbers.is_sorted(), "{numbers:?}");
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..COUNT), "{numbers:?}");
    }

    #[test]
    fn a_fault_strikes_its_own_kind_of_frames_only() {
        for traffic in [Traffic::Openings, Traffic::Confirmations, Traffic::Answers] {
            let (numbers, struck) = arrivals(Fault::loses(traffic, 100), COUNT);
            assert_eq!((numbers.len(), struck), (COUNT, 0), "{traffic:?}");
        }
    }
}
