//! A host of one's own: namespace, interfaces, packet sockets, loaded programs.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use nix::time::{ClockId, clock_gettime};
use rfsis_agent::bpf::{GuardParams, LoadParams, MirrorParams, Programs};
use rfsis_common::maps::{NodeState, State};
use rfsis_common::mirror::MirrorEgress;
use tests::patience::wait_until;

use crate::frames::{OWN, SERVICE, VIP};

/// Room of an ACK gate.
pub const GUARD: GuardParams = GuardParams {
    slots: 16,
    ifindex: 0,
};

/// Runs a test in a network namespace of its own.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let result = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root: `cargo xtask test`");
        // Link-local addresses come and lose their `tentative` in the middle of a test.
        for scope in ["all", "default"] {
            let key = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
            // Missing where the kernel has no IPv6 at all.
            std::fs::write(key, "1").ok();
        }
        test();
    })
    .join();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("{command}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A veth pair, both ends here and up; `eth0` has the node's own address.
pub fn veth(mtu: u32) {
    run(&format!(
        "ip link add eth0 mtu {mtu} type veth peer name peer0 mtu {mtu}"
    ));
    run(&format!("ip addr add {OWN}/24 dev eth0"));
    run("ip link set eth0 up");
    run("ip link set peer0 up");
    for name in ["eth0", "peer0"] {
        // The kernel's link watch makes it so, a moment later.
        let show = || run(&format!("ip link show dev {name}"));
        wait_until("carrier", show, |link| link.contains("state UP"));
    }
}

/// What a clean stop must leave as it was; counters and lifetimes left out.
pub fn snapshot() -> String {
    [
        "tc qdisc show",
        "tc filter show dev eth0 ingress",
        "tc filter show dev eth0 egress",
        "ip addr",
    ]
    .map(run)
    .join("---\n")
}

pub fn gates() -> usize {
    let filters = run("tc filter show dev eth0 egress");
    filters
        .lines()
        .filter(|line| line.contains("rfsis_gate"))
        .count()
}

pub fn wait(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future);
}

pub fn load() -> Programs {
    load_with_ring(1 << 20)
}

pub fn load_with_ring(frame_ring_bytes: u32) -> Programs {
    load_with(frame_ring_bytes, None, None)
}

/// Programs with an ACK gate for 16 flows, and tap `lan`.
pub fn load_guarded() -> Programs {
    load_with(1 << 20, None, Some(GUARD))
}

/// Programs that copy for a standby by this interface.
pub fn load_mirror(interface: &str, egress: MirrorEgress) -> Programs {
    load_with(1 << 20, Some(mirror_params(interface, egress)), None)
}

/// The same with an ACK gate for 16 flows.
pub fn load_guarded_mirror(interface: &str) -> Programs {
    let mirror = mirror_params(interface, MirrorEgress::Handshake);
    load_with(1 << 20, Some(mirror), Some(GUARD))
}

/// Programs with an ACK gate for 16 flows, on this interface.
pub fn load_guarding(interface: &str) -> Programs {
    load_with(1 << 20, None, Some(guard_params(index_of(interface))))
}

/// The same, which also copy for a standby by it.
pub fn load_guarding_mirror(interface: &str) -> Programs {
    let mirror = mirror_params(interface, MirrorEgress::Handshake);
    let guard = guard_params(index_of(interface));
    load_with(1 << 20, Some(mirror), Some(guard))
}

fn guard_params(ifindex: u32) -> GuardParams {
    GuardParams { ifindex, ..GUARD }
}

fn mirror_params(interface: &str, egress: MirrorEgress) -> MirrorParams {
    let (ifindex, mac) = (index_of(interface), mac_of(interface));
    MirrorParams {
        ifindex,
        mac,
        egress,
    }
}

pub fn index_of(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap()
}

pub fn mac_of(interface: &str) -> [u8; 6] {
    link_address(interface).addr().unwrap()
}

fn load_with(
    frame_ring_bytes: u32,
    mirror: Option<MirrorParams>,
    guard: Option<GuardParams>,
) -> Programs {
    let params = LoadParams {
        vip: VIP,
        service_ports: &[SERVICE],
        observed_ports: &[],
        datagram_ports: &[SERVICE],
        frame_ring_bytes,
        max_live_flows: 16,
        mirror,
        guard,
    };
    Programs::load(params).unwrap_or_else(|error| panic!("{error}"))
}

pub fn now_ns() -> u64 {
    Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_nanos() as u64
}

pub fn set_state(programs: &Programs, state: State, lease_ns: u64) {
    let node = NodeState {
        state: state as u64,
        lease_ns,
    };
    let writer = programs.state_map().unwrap();
    writer.write(node).unwrap();
    assert_eq!(writer.read().unwrap(), node);
}

fn link_address(interface: &str) -> LinkAddr {
    nix::ifaddrs::getifaddrs()
        .unwrap()
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .unwrap()
}

/// A packet socket on an interface, protocol ETH_P_ALL.
pub fn packet_socket(interface: &str) -> OwnedFd {
    let address = link_address(interface);
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    bind(fd.as_raw_fd(), &address).unwrap();
    fd
}

/// Sends a frame as it is.
pub fn transmit(fd: &OwnedFd, frame: &[u8]) {
    send(fd.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
}

/// The next frame that fits, or `None` after the time given.
pub fn receive(fd: &OwnedFd, within: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let deadline = Instant::now() + within;
    let mut buffer = vec![0; 70_000];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap();
        if poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 0 {
            return None;
        }
        let len = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        if fits(&buffer[..len]) {
            return Some(buffer[..len].to_vec());
        }
    }
}
