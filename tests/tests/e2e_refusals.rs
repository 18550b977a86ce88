//! What the agent refuses to run with: exit code and message.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::path::Path;
use std::process::Output;

use tests::agent::{binary, run_agent};
use tests::netns::Namespace;
use tests::{Host, Lab, LabOptions, Settings};

/// Runs the agent on node a with the lab's config after `change`.
fn refused(lab: &Lab, arguments: &[&str], change: impl Fn(String) -> String) -> (i32, String) {
    let config = lab.directory().join("refused.yaml");
    std::fs::write(&config, change(Settings::heartbeat("20ms", 5).yaml())).unwrap();
    outcome(&run_agent(lab.host(Host::A), &config, arguments))
}

fn outcome(output: &Output) -> (i32, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (
        output.status.code().unwrap(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn check_accepts_the_labs_config() {
    let (code, said) = refused(&Lab::new(), &["check"], |yaml| yaml);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn check_accepts_a_mirror_with_all_that_belongs_to_it() {
    let mirror = "tap: mirror\nsync_interface: eth1\nmirror_egress: handshake";
    let (code, said) = refused(&Lab::new(), &["check"], |yaml| {
        yaml.replace("tap: lan", mirror)
    });
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("mirror over eth1"), "{said}");
}

#[test]
fn check_accepts_protection_with_all_that_belongs_to_it() {
    let sync = "protect: sync\nprotect_timeout: 100ms\nsync_port: 9502\nudp_replay: 0";
    let (code, said) = refused(&Lab::new(), &["check"], |yaml| {
        yaml.replace("protect: async", sync)
    });
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("protect sync"), "{said}");
}

#[test]
fn a_sync_interface_that_would_cut_copies_is_refused() {
    let lab = Lab::with(&LabOptions {
        sync_link: true,
        ..LabOptions::default()
    });
    lab.host(Host::A).sh("ip link set eth1 mtu 1400").unwrap();
    let (code, said) = refused(&lab, &[], |yaml| {
        yaml.replace("tap: lan", "tap: mirror\nsync_interface: eth1")
    });
    assert_eq!(code, 2, "{said}");
    for part in ["eth1", "1400", "1500"] {
        assert!(said.contains(part), "no {part} in: {said}");
    }
}

#[test]
fn check_names_line_and_field_of_every_bad_config() {
    let lab = Lab::new();
    // What is replaced, by what, and what the message must contain.
    let table: &[(&str, &str, &[&str])] = &[
        (
            "cluster: lab",
            "cluster: [1]",
            &["refused.yaml:1:", "cluster"],
        ),
        (
            "cluster: lab",
            "cluster: lab\nclutser: lab",
            &["refused.yaml:2:", "clutser"],
        ),
        ("cluster: lab\n", "", &["cluster"]),
        ("100/24", "100", &["refused.yaml:3:", "virtual_ip"]),
        ("100/24", "100/33", &["refused.yaml:3:", "virtual_ip"]),
        ("100/24", "1/24", &["nodes[0]", "virtual IP"]),
        (
            "192.168.1.100/24",
            "10.9.9.9/24",
            &["refused.yaml:4:", "nodes", "10.9.9"],
        ),
        (
            "[192.168.1.1, 192.168.1.2]",
            "[192.168.1.1, 192.168.1.1]",
            &["refused.yaml:4:", "nodes"],
        ),
        (
            "[192.168.1.1, 192.168.1.2]",
            "[192.168.1.1]",
            &["refused.yaml:4:", "nodes"],
        ),
        (
            "a key for tests only, 32 bytes or more",
            "short",
            &["refused.yaml:5:", "key", "32"],
        ),
        (
            "tap: lan",
            "tap: mirror\nmirror_egress: headers",
            &["refused.yaml:7:", "mirror_egress", "handshake or full"],
        ),
        (
            "tap: lan",
            "tap: mirror\nsync_interface: eth0",
            &["refused.yaml:7:", "sync_interface", "eth0"],
        ),
        (
            "protect: async",
            "protect: semisync",
            &["refused.yaml:7:", "protect", "async or sync"],
        ),
        (
            "protect: async",
            "protect: async\nprotect_timeout: 30ms",
            &["refused.yaml:8:", "protect_timeout", "protect: sync"],
        ),
        (
            "protect: async",
            "protect: async\nsync_port: 9501",
            &["refused.yaml:8:", "sync_port", "protect: sync"],
        ),
        (
            "protect: async",
            "protect: sync\nprotect_timeout: 2m",
            &["refused.yaml:8:", "protect_timeout", "60s"],
        ),
        (
            "protect: async",
            "protect: sync\nsync_port: 0",
            &["refused.yaml:8:", "sync_port", "65535"],
        ),
        (
            "protect: async",
            "protect: async\nudp_replay: 11s",
            &["refused.yaml:8:", "udp_replay", "10s"],
        ),
        (
            "interval: 20ms",
            "interval: 20",
            &["refused.yaml:8:", "heartbeat.interval"],
        ),
        (
            "interval: 20ms",
            "interval: 20us",
            &["refused.yaml:8:", "heartbeat.interval"],
        ),
        (
            "missed: 5",
            "missed: 1",
            &["refused.yaml:8:", "heartbeat.missed"],
        ),
        (
            "missed: 5",
            "missed: 5, lease: 100ms",
            &["refused.yaml:8:", "lease"],
        ),
        ("tcp/7", "tcp/0", &["services"]),
        ("tcp/9", "tcp/7", &["services", "tcp/7"]),
        (
            "handler: echo",
            "upstream: 127.0.0.1:7",
            &["services", "not supported yet"],
        ),
        ("handler: echo", "handler: ehco", &["services", "ehco"]),
        (
            "0.0.0.0:9500",
            "0.0.0.0",
            &["refused.yaml:9:", "metrics.listen"],
        ),
        ("interface: eth0", "interface: [", &["refused.yaml:"]),
    ];
    for (good, bad, expected) in table {
        let (code, said) = refused(&lab, &["check"], |yaml| {
            assert!(yaml.contains(good), "{good:?} is in the config");
            yaml.replacen(good, bad, 1)
        });
        assert_eq!(code, 2, "{bad:?}: {said}");
        for part in *expected {
            assert!(said.contains(part), "{bad:?}: no {part:?} in: {said}");
        }
    }
}

#[test]
fn all_errors_of_a_file_come_in_one_run() {
    let (code, said) = refused(&Lab::new(), &["check"], |yaml| {
        yaml.replace("missed: 5", "missed: 1")
            .replace("tap: lan", "tap: hub")
            .replace("tcp/7", "tcp/0")
    });
    assert_eq!(code, 2, "{said}");
    for part in ["heartbeat.missed", "tap", "services"] {
        assert!(said.contains(part), "no {part} in: {said}");
    }
}

#[test]
fn a_bad_config_stops_the_start_as_it_stops_check() {
    let (code, said) = refused(&Lab::new(), &[], |yaml| {
        yaml.replace("missed: 5", "missed: 1")
    });
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("heartbeat.missed"), "{said}");
}

#[test]
fn a_missing_config_file_is_named() {
    let namespace = Namespace::new().unwrap();
    let output = run_agent(&namespace, Path::new("/nonexistent/rfsis.yaml"), &["check"]);
    let (code, said) = outcome(&output);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("/nonexistent/rfsis.yaml"), "{said}");
}

#[test]
fn a_missing_interface_is_named_with_those_that_exist() {
    let (code, said) = refused(&Lab::new(), &[], |yaml| yaml.replace("eth0", "eth7"));
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("eth7") && said.contains("eth0"), "{said}");
}

#[test]
fn a_host_that_is_no_node_is_told_its_addresses() {
    let nodes = "[192.168.1.8, 192.168.1.9]";
    let (code, said) = refused(&Lab::new(), &[], |yaml| {
        yaml.replace("[192.168.1.1, 192.168.1.2]", nodes)
    });
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("192.168.1.8") && said.contains("192.168.1.1"),
        "{said}"
    );
}

#[test]
fn a_virtual_ip_outside_every_subnet_of_the_interface_is_refused() {
    let lab = Lab::new();
    let node = lab.host(Host::A);
    node.sh("ip addr flush dev eth0").unwrap();
    node.sh("ip addr add 192.168.1.1/30 dev eth0").unwrap();
    let (code, said) = refused(&lab, &[], |yaml| yaml);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("192.168.1.100") && said.contains("192.168.1.1/30"),
        "{said}"
    );
}

#[test]
fn a_missing_privilege_is_named_with_its_remedy() {
    let lab = Lab::new();
    let config = lab.directory().join("unprivileged.yaml");
    std::fs::write(&config, Settings::default().yaml()).unwrap();
    // Still uid 0, so that files are readable, but root in name only.
    let (binary, config) = (binary(), config.to_string_lossy().into_owned());
    let binary = binary.to_string_lossy();
    let arguments = [
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
        &*binary,
        "--config",
        &*config,
    ];
    let output = lab.host(Host::A).output("setpriv", &arguments).unwrap();
    let (code, said) = outcome(&output);
    assert_eq!(code, 3, "{said}");
    assert!(
        said.contains("CAP_NET_ADMIN") && said.contains("root"),
        "{said}"
    );
}

#[test]
fn every_single_missing_capability_is_named() {
    let lab = Lab::new();
    let config = lab.directory().join("unprivileged.yaml");
    std::fs::write(&config, Settings::default().yaml()).unwrap();
    let (binary, config) = (binary(), config.to_string_lossy().into_owned());
    let binary = binary.to_string_lossy();
    for lacking in ["bpf", "net_admin", "net_raw", "perfmon", "net_bind_service"] {
        let bounding = format!("--bounding-set=-{lacking}");
        // One that is not missed would run on.
        let arguments = [
            "20",
            "setpriv",
            &*bounding,
            "--inh-caps=-all",
            "--",
            &*binary,
            "--config",
            &*config,
        ];
        let output = lab.host(Host::A).output("timeout", &arguments).unwrap();
        let (code, said) = outcome(&output);
        assert_eq!(code, 3, "{lacking}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(last.matches("CAP_").count(), 1, "{said}");
        let name = format!("CAP_{}", lacking.to_uppercase());
        assert!(last.contains(&name) && last.contains("root"), "{said}");
        let left = lab.host(Host::A).sh("ip -o addr show dev eth0").unwrap();
        assert!(!left.contains("192.168.1.100"), "{lacking}: {left}");
    }
}

#[test]
fn an_unknown_argument_is_an_error_of_usage() {
    let (code, said) = refused(&Lab::new(), &["--rolle", "primary"], |yaml| yaml);
    assert_eq!(code, 2, "{said}");
}

#[test]
fn status_without_an_agent_says_so() {
    let (code, said) = refused(&Lab::new(), &["status"], |yaml| yaml);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("/run/rfsis/agent.sock"), "{said}");
}

/// On a machine of its own, which has not loaded the modules yet.
#[test]
#[ignore = "changes the machine: `cargo xtask test --kernel 6.1`"]
fn a_kernel_without_filters_is_named_with_what_it_lacks() {
    const LOADER: &str = "/proc/sys/kernel/modprobe";
    let lab = Lab::new();
    let loader = std::fs::read_to_string(LOADER).unwrap();
    std::fs::write(LOADER, "/bin/false").unwrap();
    let (code, said) = refused(&lab, &[], |yaml| yaml);
    std::fs::write(LOADER, loader).unwrap();
    assert_eq!(code, 3, "{said}");
    assert!(
        said.contains("CONFIG_NET_SCH_INGRESS") && said.contains("cls_bpf"),
        "{said}"
    );
}

/// The other tests need a kernel on which this one cannot hold.
#[test]
#[ignore = "needs a kernel before 5.18: `cargo xtask test --kernel 5.10`"]
fn a_kernel_that_is_too_old_is_named_with_the_one_it_takes() {
    let running = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let (code, said) = refused(&Lab::new(), &[], |yaml| yaml);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains(running.trim()), "{said}");
    assert!(said.contains("expected Linux 5.18 or later"), "{said}");
    println!("{said}");
}
