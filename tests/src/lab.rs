//! The LAN: two nodes and a client on a bridge that floods as a hub does, or learns as a switch does.
//!
//! ```text
//!   client .50        node a .1        node b .2
//!      eth0              eth0             eth0        one namespace each
//!        │                 │                │
//!    to-client          to-a             to-b        ports of br0, in a namespace of its own
//!        └────────────── br0 ───────────────┘
//!                         eth1 ───────── eth1      if asked for: a cable between the nodes
//! ```

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use aya::util::KernelVersion;

use crate::netns::Namespace;
use crate::patience::wait_until;

/// The VIP of every lab.
pub const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);

/// A host of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// The client, 192.168.1.50.
    Client,
    /// Node 192.168.1.1, as a rule the primary.
    A,
    /// Node 192.168.1.2, as a rule the backup.
    B,
}

impl Host {
    /// All hosts.
    pub const ALL: [Host; 3] = [Host::Client, Host::A, Host::B];

    /// Own address.
    pub const fn address(self) -> Ipv4Addr {
        let last = match self {
            Host::Client => 50,
            Host::A => 1,
            Host::B => 2,
        };
        Ipv4Addr::new(192, 168, 1, last)
    }

    /// Hardware address of its eth0.
    pub const fn mac(self) -> [u8; 6] {
        let [.., last] = self.address().octets();
        [0x02, 0, 0, 0, 0, last]
    }

    /// [`Host::mac`] as `ip` prints it.
    pub fn mac_text(self) -> String {
        self.mac().map(|byte| format!("{byte:02x}")).join(":")
    }

    /// Name of its port on the bridge.
    pub(crate) const fn port(self) -> &'static str {
        match self {
            Host::Client => "to-client",
            Host::A => "to-a",
            Host::B => "to-b",
        }
    }
}

/// Where the nodes have the cable between them.
pub const SYNC_INTERFACE: &str = "eth1";

/// Where the bridge sends a frame for a host that it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bridge {
    /// To everybody: a hub, or a switch with a mirror port.
    #[default]
    Flooding,
    /// To that host alone: any switch.
    Learning,
}

/// What may differ between labs.
#[derive(Clone, Debug, Default)]
pub struct LabOptions {
    /// MTU of every device; 1500 if not given.
    pub mtu: Option<u32>,
    /// How frames are forwarded.
    pub bridge: Bridge,
    /// Whether devices take super-frames and unfinished checksums, and aggregate what they receive.
    pub offloads: bool,
    /// Whether there is a cable between the nodes besides the LAN.
    pub sync_link: bool,
    /// sysctls of the client below `/proc/sys/net`, with slashes.
    pub client_sysctls: Vec<(&'static str, &'static str)>,
    /// How fast the client sends at the most, as tc(8) writes it; as fast as it can if not given.
    pub client_rate: Option<&'static str>,
}

/// The namespaces and the bridge. The hosts may be held longer than the lab.
#[derive(Debug)]
pub struct Lab {
    client: Arc<Namespace>,
    a: Arc<Namespace>,
    b: Arc<Namespace>,
    bridge: Namespace,
    directory: tempfile::TempDir,
}

impl Lab {
    /// A lab with the defaults.
    ///
    /// # Panics
    /// Where the kernel or the privileges do not allow it; says what failed.
    pub fn new() -> Self {
        Self::with(&LabOptions::default())
    }

    /// A lab with options.
    ///
    /// # Panics
    /// Where the kernel or the privileges do not allow it; says what failed.
    pub fn with(options: &LabOptions) -> Self {
        Self::build(options).unwrap_or_else(|error| panic!("cannot build the lab: {error:#}"))
    }

    /// A lab with options.
    ///
    /// # Errors
    /// Where the kernel or the privileges do not allow it; says what failed.
    pub fn build(options: &LabOptions) -> Result<Self> {
        let lab = Self {
            client: Arc::new(Namespace::new()?),
            a: Arc::new(Namespace::new()?),
            b: Arc::new(Namespace::new()?),
            bridge: Namespace::new()?,
            directory: tempfile::tempdir()?,
        };
        for (key, value) in &options.client_sysctls {
            lab.client.sysctl(key, value)?;
        }
        // With br_netfilter a bridge checks IP headers and drops bad frames; a hub does not.
        for layer in ["arptables", "ip6tables", "iptables"] {
            // Missing where the kernel has no br_netfilter.
            lab.bridge
                .sysctl(&format!("bridge/bridge-nf-call-{layer}"), "0")
                .ok();
        }
        let mtu = options.mtu.unwrap_or(1500);
        // Hundredths of a second.
        let ageing = match options.bridge {
            Bridge::Flooding => 0,
            Bridge::Learning => 30_000,
        };
        lab.bridge.sh(&format!(
            "ip link add br0 mtu {mtu} type bridge ageing_time {ageing} forward_delay 0 mcast_snooping 0"
        ))?;
        // A switch is no host, that would look at who is asked for.
        lab.bridge.sh("ip link set br0 arp off up")?;
        for host in Host::ALL {
            lab.connect(host, mtu, options)?;
        }
        if let Some(rate) = options.client_rate {
            lab.client.sh(&format!(
                "tc qdisc add dev eth0 root tbf rate {rate} burst 256kb limit 64mb"
            ))?;
        }
        if options.sync_link {
            lab.connect_nodes(mtu)?;
        }
        Ok(lab)
    }

    fn connect_nodes(&self, mtu: u32) -> Result<()> {
        self.a.sh(&format!(
            "ip link add {SYNC_INTERFACE} mtu {mtu} type veth peer name {SYNC_INTERFACE} mtu {mtu} netns {}",
            self.b.path().display()
        ))?;
        for node in [&self.a, &self.b] {
            node.sh(&format!("ip link set {SYNC_INTERFACE} up"))?;
            // As on the LAN's ports: a cable holds back, it does not lose.
            node.sh(&format!(
                "tc qdisc add dev {SYNC_INTERFACE} root pfifo limit 100000"
            ))?;
        }
        // The first end is down until the link watch has noticed that the second is up.
        for node in [&self.a, &self.b] {
            let up = wait_until(
                "the sync link",
                || node.sh(&format!("cat /sys/class/net/{SYNC_INTERFACE}/operstate")),
                |state| state.as_ref().is_ok_and(|state| state.trim() == "up"),
            );
            up?;
        }
        Ok(())
    }

    fn connect(&self, host: Host, mtu: u32, options: &LabOptions) -> Result<()> {
        let (port, inside) = (host.port(), self.host(host));
        self.bridge.sh(&format!(
            "ip link add {port} type veth peer name eth0 netns {}",
            inside.path().display()
        ))?;
        self.bridge
            .sh(&format!("ip link set {port} mtu {mtu} master br0"))?;
        let learning = match options.bridge {
            Bridge::Flooding => "off",
            Bridge::Learning => "on",
        };
        let flood = format!("learning {learning} flood on mcast_flood on bcast_flood on");
        self.bridge
            .sh(&format!("bridge link set dev {port} {flood}"))?;
        // A cable carries VLAN tags inside the frame, not beside it.
        let inside_frame = "rxvlan off txvlan off tx-vlan-stag-hw-insert off";
        self.bridge
            .sh(&format!("ethtool -K {port} {inside_frame}"))?;
        // A veth without a qdisc drops what its 256 slots do not hold; with one it holds the sender
        // back (from Linux 6.16 on, drivers/net/veth.c), as a switch with buffers would not lose.
        // Older ones drop all the same, so there the cable is slower than those who read from it.
        let qdisc = if KernelVersion::current()? < KernelVersion::new(6, 16, 0) {
            "tbf rate 400mbit burst 64kb limit 64mb"
        } else {
            "pfifo limit 100000"
        };
        self.bridge
            .sh(&format!("tc qdisc add dev {port} root {qdisc}"))?;
        self.bridge.sh(&format!("ip link set {port} up"))?;
        inside.sh("ip link set lo up")?;
        let mac = host.mac_text();
        inside.sh(&format!("ip link set eth0 mtu {mtu} address {mac}"))?;
        // veth hands on unfinished checksums and frames above the MTU; a cable does not.
        let offloads = if options.offloads { "on" } else { "off" };
        inside.sh(&format!(
            "ethtool -K eth0 tx {offloads} tso {offloads} gso {offloads} gro {offloads}"
        ))?;
        inside.sh(&format!("ethtool -K eth0 {inside_frame}"))?;
        inside.sh(&format!("ip addr add {}/24 dev eth0", host.address()))?;
        inside.sh("ip link set eth0 up")?;
        Ok(())
    }

    /// The namespace of a host.
    pub fn host(&self, host: Host) -> &Arc<Namespace> {
        match host {
            Host::Client => &self.client,
            Host::A => &self.a,
            Host::B => &self.b,
        }
    }

    /// The namespace of the client.
    pub fn client(&self) -> &Arc<Namespace> {
        &self.client
    }

    /// The namespace of the bridge.
    pub(crate) fn bridge(&self) -> &Namespace {
        &self.bridge
    }

    /// A directory for files of this lab, removed with it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Frames for the host that the cable lost because its queue was full. With `tap: lan` such a
    /// loss at the standby alone costs the flow its shadow, and no fault of the agent's.
    ///
    /// # Panics
    /// When the port is gone.
    pub fn lost_towards(&self, host: Host) -> u64 {
        tx_dropped(self.bridge(), host.port())
    }

    /// Frames of the host that the cable lost because its queue was full.
    ///
    /// # Panics
    /// When the host is gone.
    pub fn lost_from(&self, host: Host) -> u64 {
        tx_dropped(self.host(host), "eth0")
    }

    /// Pulls the host's cable: both ends lose carrier.
    ///
    /// # Panics
    /// When the port is gone.
    pub fn cut(&self, host: Host) {
        self.set_port(host, "down");
    }

    /// Plugs the host's cable in again.
    ///
    /// # Panics
    /// When the port is gone.
    pub fn mend(&self, host: Host) {
        self.set_port(host, "up");
    }

    /// Makes the host's cable as slow as this, both ways: `1gbit`, as `tc` writes rates. What waits is
    /// held back, not lost.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn limit(&self, host: Host, rate: &str) -> Result<()> {
        // The burst takes whole super-frames, the limit the windows of all connections.
        let tbf = format!("root tbf rate {rate} burst 256kb limit 64mb");
        let port = host.port();
        self.bridge
            .sh(&format!("tc qdisc replace dev {port} {tbf}"))?;
        self.host(host)
            .sh(&format!("tc qdisc replace dev eth0 {tbf}"))?;
        Ok(())
    }

    fn set_port(&self, host: Host, to: &str) {
        let line = format!("ip link set {} {to}", host.port());
        if let Err(error) = self.bridge.sh(&line) {
            panic!("{error:#}");
        }
    }
}

fn tx_dropped(namespace: &Namespace, interface: &str) -> u64 {
    let file = format!("/sys/class/net/{interface}/statistics/tx_dropped");
    let count = namespace.sh(&format!("cat {file}"));
    match count.map(|count| count.trim().parse()) {
        Ok(Ok(count)) => count,
        other => panic!("{file}: {other:?}"),
    }
}

impl Drop for Lab {
    /// A failing test should tell a frame that the cable lost from one that the agent lost.
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in Host::ALL {
                let file = format!("/sys/class/net/{}/statistics/tx_dropped", host.port());
                let lost = self.bridge.sh(&format!("cat {file}"));
                eprintln!("frames lost on the cable to {host:?}: {lost:?}");
            }
        }
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patience::wait_until;

    fn ping(lab: &Lab, from: Host, to: Host) -> bool {
        let address = to.address().to_string();
        // One try a look: the caller repeats.
        let listener = lab
            .host(to)
            .run(|| std::net::TcpListener::bind((to.address(), 4000)));
        let Ok(_listener) = listener else {
            return false;
        };
        let line = format!("nc -z -w 1 {address} 4000");
        lab.host(from).sh(&line).is_ok()
    }

    #[test]
    fn all_hosts_reach_each_other_and_a_cut_host_reaches_nobody_until_mended() {
        let lab = Lab::new();
        for from in Host::ALL {
            for to in Host::ALL {
                if from != to {
                    wait_until("a connection", || ping(&lab, from, to), |&reached| reached);
                }
            }
        }
        lab.cut(Host::A);
        assert!(!ping(&lab, Host::Client, Host::A));
        assert!(
            lab.host(Host::A)
                .sh("ip link show eth0")
                .unwrap()
                .contains("NO-CARRIER")
        );
        lab.mend(Host::A);
        wait_until(
            "a connection",
            || ping(&lab, Host::Client, Host::A),
            |&reached| reached,
        );
    }

    #[test]
    fn a_client_sysctl_holds_in_the_client_only() {
        let lab = Lab::with(&LabOptions {
            client_sysctls: vec![("ipv4/tcp_sack", "0")],
            ..LabOptions::default()
        });
        let sack = |host| {
            lab.host(host)
                .run(|| std::fs::read_to_string("/proc/sys/net/ipv4/tcp_sack"))
                .unwrap()
        };
        assert_eq!(
            (sack(Host::Client).trim(), sack(Host::A).trim()),
            ("0", "1")
        );
    }
}
