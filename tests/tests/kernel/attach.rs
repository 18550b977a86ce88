//! Attaching, outliving, replacing, and leaving no trace.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::Xdp;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, send};
use rfsis_agent::bpf::{self, BpfError, LoadParams, Program, Programs, SkbContext, XdpMode};
use rfsis_agent::netif::{Netif, VipAddress};
use rfsis_common::frame::tcp_flags::ACK;
use rfsis_common::maps::{FrameHeader, State, names};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};

use crate::frames::{VIP, from_vip, tcp_from_vip, tcp_to_vip, with};
use crate::host::{
    gates, in_namespace, load, load_with_ring, now_ns, packet_socket, receive, run, set_state,
    snapshot, veth, wait,
};

/// Helper process of the test below: attaches a gate and dies like an agent by `kill -9`.
#[test]
#[ignore = "helper process of other tests"]
fn attach_the_gate_and_die() {
    let lease_ms = std::env::var("RFSIS_TEST_LEASE_MS").expect("not for running by hand");
    let lease_ns = lease_ms.parse::<u64>().unwrap() * 1_000_000;
    let mut programs = load();
    programs.attach_gate("eth0").unwrap();
    programs.attach_ingress("eth0", XdpMode::Native).unwrap();
    set_state(&programs, State::Active, now_ns() + lease_ns);
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn attach_in_a_process_that_dies(lease_ms: u32) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "attach::attach_the_gate_and_die"])
        .env("RFSIS_TEST_LEASE_MS", lease_ms.to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(9), "{text}");
}

#[test]
fn the_gate_outlives_its_process_closed() {
    in_namespace(|| {
        veth(1500);
        let (sender, receiver) = (packet_socket("eth0"), packet_socket("peer0"));
        let frame = tcp_from_vip(ACK, b"x");
        let passes = || {
            send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
            receive(&receiver, Duration::from_millis(100), from_vip).is_some()
        };
        assert!(passes(), "without a gate the frame arrives");
        attach_in_a_process_that_dies(300);
        assert_eq!(gates(), 1);
        let deadline = Instant::now() + Duration::from_secs(5);
        // The lease of the dead agent runs out by itself.
        while passes() {
            assert!(Instant::now() < deadline, "the gate stays open");
        }
        for _ in 0..3 {
            assert!(!passes(), "the gate opened again");
        }
        assert!(
            !run("ip link show dev eth0").contains("xdp"),
            "XDP goes with its process"
        );
    });
}

#[test]
fn a_gate_is_replaced_without_a_gap_and_never_stacked() {
    in_namespace(|| {
        veth(1500);
        let receiver = packet_socket("peer0");
        attach_in_a_process_that_dies(0);
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let hammer = thread::spawn({
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            let sender = packet_socket("eth0");
            let frame = tcp_from_vip(ACK, b"x");
            move || {
                while !stop.load(Ordering::Relaxed) {
                    send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..20 {
            let before = sent.load(Ordering::Relaxed);
            let mut programs = load();
            programs.attach_gate("eth0").unwrap();
            assert_eq!(gates(), 1);
            drop(programs);
            assert_eq!(
                gates(),
                1,
                "a gate is left when its agent's handles are dropped"
            );
            while sent.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        hammer.join().unwrap();
        let leaked = receive(&receiver, Duration::from_millis(100), from_vip);
        assert!(leaked.is_none(), "a frame from the VIP got past the gate");
        assert!(sent.load(Ordering::Relaxed) > 1000);
    });
}

#[test]
fn the_gate_opens_and_closes_with_the_state_and_leaves_other_filters_running() {
    in_namespace(|| {
        veth(1500);
        run("tc qdisc add dev eth0 clsact");
        // Drops what goes to 192.168.1.51, the address at offset 30; direct action 2 is TC_ACT_SHOT.
        let drops = "4,32 0 0 30,21 0 1 3232235827,6 0 0 2,6 0 0 0";
        let words = "filter add dev eth0 egress prio 50 protocol all bpf da bytecode";
        let added = Command::new("tc")
            .args(words.split(' '))
            .arg(drops)
            .status();
        assert!(added.unwrap().success());
        let before = snapshot();
        let (sender, receiver) = (packet_socket("eth0"), packet_socket("peer0"));
        let passes = |frame: &[u8]| {
            match send(sender.as_raw_fd(), frame, MsgFlags::empty()) {
                // ENOBUFS is how a packet socket hears of TC_ACT_SHOT.
                Ok(_) | Err(nix::errno::Errno::ENOBUFS) => {}
                Err(error) => panic!("{error}"),
            }
            receive(&receiver, Duration::from_millis(100), from_vip).is_some()
        };
        let mut programs = load();
        programs.attach_gate("eth0").unwrap();
        let frame = tcp_from_vip(ACK, b"x");
        assert!(!passes(&frame), "a new gate is closed");
        set_state(&programs, State::Active, u64::MAX);
        assert!(passes(&frame));
        let elsewhere = with(frame.clone(), 33, &[51]);
        assert!(!passes(&elsewhere), "the host's own filter still drops");
        set_state(&programs, State::Standby, u64::MAX);
        assert!(!passes(&frame));
        wait(async { programs.detach().await.unwrap() });
        assert_eq!(snapshot(), before, "the host's own clsact and filter stay");
        assert!(passes(&frame));
    });
}

#[test]
fn a_clean_stop_leaves_the_interface_as_it_was() {
    in_namespace(|| {
        veth(1500);
        let before = snapshot();
        wait(async {
            let mut programs = load();
            programs.attach_gate("eth0").unwrap();
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(netif.add_vip(VIP, 24).await.unwrap(), VipAddress::Added);
            programs.attach_ingress("eth0", XdpMode::Native).unwrap();
            assert!(run("ip link show dev eth0").contains("xdp"));
            assert_ne!(snapshot(), before);
            assert!(netif.remove_vip_if_ours(VIP).await.unwrap());
            programs.detach().await.unwrap();
        });
        assert_eq!(snapshot(), before);
        assert!(!run("ip link show dev eth0").contains("xdp"));
    });
}

#[test]
fn cleanup_after_a_crash_leaves_the_interface_as_it_was() {
    in_namespace(|| {
        veth(1500);
        let before = snapshot();
        attach_in_a_process_that_dies(0);
        wait(async {
            let netif = Netif::new("eth0").await.unwrap();
            netif.add_vip(VIP, 24).await.unwrap();
            // What a run after the crash does: it has not added the VIP, and still knows whose it is.
            let netif = Netif::new("eth0").await.unwrap();
            assert_eq!(
                netif.add_vip(VIP, 24).await.unwrap(),
                VipAddress::AlreadyThere
            );
            assert!(netif.remove_vip_if_ours(VIP).await.unwrap());
            bpf::cleanup("eth0").await.unwrap();
            assert_eq!(snapshot(), before);
            bpf::cleanup("eth0").await.unwrap();
        });
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn cleanup_refuses_to_take_the_program_of_a_running_agent() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        programs.attach_gate("eth0").unwrap();
        programs.attach_ingress("eth0", XdpMode::Native).unwrap();
        let mut second = load();
        let error = second.attach_ingress("eth0", XdpMode::Native).unwrap_err();
        assert!(matches!(error, BpfError::XdpBusy { .. }), "{error:?}");
        wait(async {
            let error = bpf::cleanup("eth0").await.unwrap_err();
            assert!(matches!(error, BpfError::XdpBusy { .. }), "{error:?}");
        });
        assert!(run("ip link show dev eth0").contains("xdp"));
        assert_eq!(gates(), 1, "the gate of a running agent stays");
    });
}

#[test]
fn cleanup_takes_an_xdp_program_of_ours_that_nobody_holds_and_no_other() {
    in_namespace(|| {
        veth(1500);
        // Attached by netlink, as on a kernel without XDP links, and left behind.
        let attach = |name: &str| {
            let mut ebpf = aya::Ebpf::load(bpf::OBJECT).unwrap();
            let program: &mut Xdp = ebpf.program_mut(names::XDP).unwrap().try_into().unwrap();
            program.load().unwrap();
            let index = nix::net::if_::if_nametoindex(name).unwrap();
            let fd = program.fd().unwrap().as_fd().as_raw_fd();
            let mut message = LinkMessage::default();
            message.header.index = index;
            let native = LinkXdp::Flags(1 << 2);
            let xdp = LinkAttribute::Xdp(vec![LinkXdp::Fd(fd), native]);
            message.attributes.push(xdp);
            wait(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                handle.link().change(message).execute().await.unwrap();
            });
        };
        attach("eth0");
        attach("peer0");
        assert!(run("ip link show dev eth0").contains("xdp"), "left behind");
        wait(async { bpf::cleanup("eth0").await.unwrap() });
        assert!(!run("ip link show dev eth0").contains("xdp"));
        assert!(
            run("ip link show dev peer0").contains("xdp"),
            "another interface's stays"
        );
    });
}

/// Helper process of the test below: an agent without privileges.
#[test]
#[ignore = "helper process of other tests"]
fn load_and_tell() {
    let params = LoadParams {
        vip: VIP,
        service_ports: &[],
        observed_ports: &[],
        datagram_ports: &[],
        frame_ring_bytes: 4096,
        max_live_flows: 1,
        mirror: None,
        guard: None,
    };
    let error = Programs::load(params).unwrap_err();
    println!("exit {}: {error}", error.exit_code());
}

#[test]
fn a_missing_privilege_is_named_with_the_remedy() {
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let readable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), readable).unwrap();
    let program = directory.path().join("kernel");
    // By another process: a child that another test forks meanwhile would hold our descriptor of the
    // copy, and a file that is open for writing cannot be run.
    let own = std::env::current_exe().unwrap();
    run(&format!("cp {} {}", own.display(), program.display()));
    let output = Command::new(program)
        .args([
            "--ignored",
            "--exact",
            "--nocapture",
            "attach::load_and_tell",
        ])
        .current_dir("/")
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("exit 3") && text.contains("CAP_NET_ADMIN"),
        "{text}"
    );
}

#[test]
fn what_the_programs_log_becomes_events() {
    in_namespace(|| {
        let mut programs = load_with_ring(4096);
        let log = programs.take_log().unwrap();
        let frame = tcp_to_vip(ACK, &[0; 1000]);
        for _ in 0..40 {
            let context = SkbContext::default();
            programs.test_run(Program::Xdp, &frame, context).unwrap();
        }
        let output = tempfile::NamedTempFile::new().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(Arc::new(output.reopen().unwrap()));
        tracing::subscriber::with_default(subscriber.finish(), || {
            wait(async {
                // The task never ends by itself; what is in the ring is passed on at its first turn.
                let ended = tokio::time::timeout(Duration::from_millis(200), log.run()).await;
                assert!(ended.is_err(), "{ended:?}");
            });
        });
        let text = std::fs::read_to_string(output.path()).unwrap();
        assert!(
            text.contains("WARN") && text.contains("frame ring full"),
            "{text}"
        );
        let lines = text.matches("frame ring full").count();
        assert!(lines < 8, "{lines} lines for 40 frames: not rare");
    });
}

#[test]
fn frames_are_caught_by_xdp_and_by_tc_where_the_driver_has_none() {
    in_namespace(|| {
        veth(1500);
        let mut programs = load();
        programs.attach_gate("eth0").unwrap();
        let mode = programs.attach_ingress("eth0", XdpMode::Native).unwrap();
        assert_eq!(mode, XdpMode::Native);
        assert!(run("ip link show dev eth0").contains("xdp "));
        assert!(!run("tc filter show dev eth0 ingress").contains("rfsis_ingress"));

        // A bridge has no native mode.
        run("ip link add bridge0 type bridge");
        programs.attach_gate("bridge0").unwrap();
        let mode = programs.attach_ingress("bridge0", XdpMode::Native).unwrap();
        assert_eq!(mode, XdpMode::Tc);
        assert!(!run("ip link show dev bridge0").contains("xdp"));
        assert!(run("tc filter show dev bridge0 ingress").contains("rfsis_ingress"));
        wait(async { programs.detach().await.unwrap() });
        for interface in ["eth0", "bridge0"] {
            assert!(!run(&format!("tc qdisc show dev {interface}")).contains("clsact"));
        }
    });
}

#[test]
fn what_catches_frames_by_tc_takes_the_place_of_a_mirror_and_of_a_dead_agents_and_is_cleaned_up() {
    in_namespace(|| {
        veth(1500);
        let ingress = || run("tc filter show dev eth0 ingress");
        let count = || {
            ingress()
                .lines()
                .filter(|line| line.contains("handle"))
                .count()
        };
        for _ in 0..2 {
            let mut programs = load();
            programs.attach_gate("eth0").unwrap();
            programs.attach_mirror("eth0").unwrap();
            programs.attach_ingress("eth0", XdpMode::Tc).unwrap();
            assert!(ingress().contains("rfsis_ingress"), "{}", ingress());
            assert_eq!(count(), 1, "{}", ingress());
            // Dropped without being detached: the agent was killed.
        }
        let mut programs = load();
        programs.remove_mirror("eth0").unwrap();
        assert_eq!(count(), 0, "{}", ingress());
        programs.attach_ingress("eth0", XdpMode::Tc).unwrap();
        drop(programs);
        wait(async { bpf::cleanup("eth0").await.unwrap() });
        assert!(!run("tc qdisc show dev eth0").contains("clsact"));
    });
}

#[test]
fn jumbo_frames_are_mirrored_whole_in_both_modes() {
    in_namespace(|| {
        for mode in XdpMode::ALL {
            veth(9000);
            let mut programs = load();
            assert_eq!(programs.attach_ingress("eth0", mode).unwrap(), mode);
            let ring = programs.take_frames().unwrap();
            let sender = packet_socket("peer0");
            let payload: Vec<u8> = (0..8900).map(|byte| (byte % 251) as u8).collect();
            let frame = tcp_to_vip(ACK, &payload);
            send(sender.as_raw_fd(), &frame, MsgFlags::empty()).unwrap();
            let ready = {
                let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, 2000_u16).unwrap()
            };
            assert_eq!(
                ready,
                1,
                "{mode:?}: {:?}",
                programs.counters().unwrap().xdp()
            );
            let mut ring = ring;
            let entry = ring.next().unwrap();
            let (header, copy) = FrameHeader::split(&entry).unwrap();
            assert!(copy == frame, "{mode:?}: the copy differs");
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            assert_eq!(header.ifindex, index);
            drop(programs);
            run("ip link del eth0");
        }
    });
}
