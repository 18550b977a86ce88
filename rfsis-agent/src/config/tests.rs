use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::handler::HandlerKind;

const SHIPPED: &str = include_str!("../../../config.yaml");

/// Valid, short, one field a line.
const GOOD: &str = "\
cluster: demo
interface: eth0
virtual_ip: 192.168.1.100/24
nodes: [192.168.1.1, 192.168.1.2]
key: 0123456789abcdef0123456789abcdef
heartbeat: { interval: 10ms, missed: 3 }
services:
  - { name: echo, listen: tcp/7, handler: echo }
";

fn read(text: &str) -> Result<Config, ConfigErrors> {
    parse(text, Path::new("config.yaml"))
}

/// The messages for a text, one a line.
fn messages(text: &str) -> Vec<String> {
    match read(text) {
        Ok(config) => panic!("accepted: {config}\n{text}"),
        Err(errors) => errors.to_string().lines().map(str::to_owned).collect(),
    }
}

/// `GOOD` with one line replaced (`from` is its start), or a line added where `from` is empty.
fn with(from: &str, to: &str) -> String {
    if from.is_empty() {
        return format!("{GOOD}{to}\n");
    }
    let mut replaced = 0;
    let text: String = GOOD
        .lines()
        .map(|line| {
            if line.trim_start().starts_with(from) {
                replaced += 1;
                format!("{to}\n")
            } else {
                format!("{line}\n")
            }
        })
        .collect();
    assert_eq!(replaced, 1, "{from}");
    text
}

#[test]
fn the_shipped_config_is_the_demo() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../config.yaml"));
    let config = load(path).unwrap();
    assert_eq!(
        config.to_string(),
        "cluster demo, virtual IP 192.168.1.100/24 on eth0, nodes 192.168.1.1 and 192.168.1.2, \
         tap mirror, protect sync, takeover after 30ms, 8 services"
    );
    assert_eq!(config.heartbeat.lease, Duration::from_millis(25));
    assert_eq!(config.heartbeat.startup_grace, Duration::from_secs(3));
    assert_eq!(config.metrics, "0.0.0.0:9500".parse().unwrap());
    assert_eq!(config.control, Path::new("/run/rfsis/agent.sock"));
    let mut offered: Vec<_> = config
        .services
        .iter()
        .map(|service| (service.protocol.as_str(), service.port, service.handler))
        .collect();
    offered.sort_by_key(|(protocol, port, _)| (*protocol, *port));
    let by_port = [
        (7, HandlerKind::Echo),
        (9, HandlerKind::Discard),
        (13, HandlerKind::Daytime),
        (19, HandlerKind::Chargen),
    ];
    let expected: Vec<_> = ["tcp", "udp"]
        .into_iter()
        .flat_map(|protocol| by_port.map(|(port, handler)| (protocol, port, handler)))
        .collect();
    assert_eq!(offered, expected);
}

/// Another YAML reader takes the shipped file for the same data: no dialect of our own.
#[test]
fn the_shipped_config_is_plain_yaml() {
    let value: serde_yaml::Value = serde_yaml::from_str(SHIPPED).unwrap();
    let config = read(SHIPPED).unwrap();
    assert_eq!(value["cluster"].as_str(), Some(config.cluster.as_str()));
    assert_eq!(value["heartbeat"]["missed"].as_u64(), Some(3));
    assert_eq!(value["key"].as_str().unwrap().as_bytes(), config.key.0);
    let services = value["services"].as_sequence().unwrap();
    assert_eq!(services.len(), config.services.len());
    for (value, service) in services.iter().zip(&config.services) {
        assert_eq!(value["name"].as_str(), Some(service.name.as_str()));
    }
}

#[test]
fn what_is_left_out_has_the_documented_default() {
    let config = read(GOOD).unwrap();
    assert_eq!(
        config.shadow,
        ShadowConfig {
            max_flows: 20_000,
            max_bytes: 256 << 20,
            idle_timeout: Duration::from_secs(7200),
            ring_bytes: 32 << 20,
        }
    );
    assert_eq!(
        config.protect,
        Protect::Sync(SyncConfig {
            timeout: Duration::from_millis(30),
            port: 9501,
        })
    );
    assert_eq!(
        config.tap,
        Tap::Mirror(MirrorConfig {
            sync_interface: None,
            egress: MirrorEgress::Handshake,
        })
    );
    assert_eq!(config.udp_replay, Duration::from_secs(1));
    assert_eq!(config.preempt, None);
    assert_eq!(config.metrics, "0.0.0.0:9500".parse().unwrap());
    assert_eq!(config.control, Path::new("/run/rfsis/agent.sock"));
    assert_eq!(config.heartbeat.lease, Duration::from_millis(25));
    assert_eq!(config.heartbeat.startup_grace, Duration::from_secs(3));
    let slow = read(&with(
        "heartbeat",
        "heartbeat: { interval: 10s, missed: 3 }",
    ))
    .unwrap();
    assert_eq!(slow.heartbeat.startup_grace, Duration::from_secs(30));
}

#[test]
fn what_is_given_is_taken() {
    let text = with(
        "heartbeat",
        "heartbeat: { interval: 1ms, missed: 4, lease: 2500us, startup_grace: 1s }\n\
         shadow: { max_flows: 10, max_bytes: 2GiB, idle_timeout: 1h 30m, ring_bytes: 64KiB }\n\
         metrics: { listen: '[::1]:9501' }\n\
         control: /tmp/a.sock\n\
         tap: lan\n\
         protect: async\n\
         udp_replay: 10s\n\
         preempt: 90s",
    );
    let config = read(&text).unwrap();
    assert_eq!((config.tap, config.protect), (Tap::Lan, Protect::Async));
    assert_eq!(config.udp_replay, Duration::from_secs(10));
    assert_eq!(config.preempt, Some(Duration::from_secs(90)));
    assert_eq!(
        config.heartbeat,
        HeartbeatConfig {
            interval: Duration::from_millis(1),
            missed: 4,
            lease: Duration::from_micros(2500),
            startup_grace: Duration::from_secs(1),
        }
    );
    assert_eq!(
        config.shadow,
        ShadowConfig {
            max_flows: 10,
            max_bytes: 2 << 30,
            idle_timeout: Duration::from_secs(5400),
            ring_bytes: 64 << 10,
        }
    );
    assert_eq!(config.metrics, "[::1]:9501".parse().unwrap());
    assert_eq!(config.control, Path::new("/tmp/a.sock"));
}

#[test]
fn a_mirror_goes_over_the_interface_of_the_vip_unless_told_otherwise() {
    let config = read(GOOD).unwrap();
    assert_eq!(config.interfaces().collect::<Vec<_>>(), ["eth0"]);
    let text = "sync_interface: eth1\nmirror_egress: full";
    let config = read(&with("", text)).unwrap();
    assert_eq!(
        config.tap,
        Tap::Mirror(MirrorConfig {
            sync_interface: Some("eth1".into()),
            egress: MirrorEgress::Full,
        })
    );
    assert_eq!(config.interfaces().collect::<Vec<_>>(), ["eth0", "eth1"]);
}

#[test]
fn xdp_is_the_interfaces_choice_unless_told_otherwise() {
    for (text, expected) in [
        ("", None),
        ("xdp: auto", None),
        ("xdp: native", Some(XdpMode::Native)),
        ("xdp: off", Some(XdpMode::Tc)),
    ] {
        assert_eq!(read(&with("", text)).unwrap().xdp, expected, "{text}");
    }
}

#[test]
fn protection_waits_for_a_takeover_time_unless_told_otherwise() {
    let sync = |text: &str| match read(&with("", text)).unwrap().protect {
        Protect::Sync(sync) => (sync.timeout, sync.port),
        Protect::Async => panic!("async: {text}"),
    };
    let ms = Duration::from_millis;
    assert_eq!(sync("protect: sync"), (ms(30), 9501));
    // A port of the VIP's services is none of the node's own address.
    let text = "protect: sync\nprotect_timeout: 1ms\nsync_port: 7\n\
                udp_replay: 0";
    assert_eq!(sync(text), (ms(1), 7));
    assert_eq!(sync("protect: sync\nprotect_timeout: 60s").0, ms(60_000));
    assert_eq!(
        read(&with("", "protect: async")).unwrap().protect,
        Protect::Async
    );
}

#[test]
fn a_mirror_copies_by_default_what_its_protection_needs() {
    for (protect, egress, expected) in [
        ("async", "", MirrorEgress::Full),
        ("sync", "", MirrorEgress::Handshake),
        ("async", "mirror_egress: handshake", MirrorEgress::Handshake),
        ("sync", "mirror_egress: full", MirrorEgress::Full),
    ] {
        let text = format!("tap: mirror\nprotect: {protect}\n{egress}");
        match read(&with("", &text)).unwrap().tap {
            Tap::Mirror(mirror) => assert_eq!(mirror.egress, expected, "{text}"),
            Tap::Lan => panic!("{text}"),
        }
    }
}

#[test]
fn datagrams_wait_for_no_answer_where_udp_replay_is_zero() {
    for zero in ["0", "0ms", "0s"] {
        let config = read(&with("", &format!("udp_replay: {zero}"))).unwrap();
        assert_eq!(config.udp_replay, Duration::ZERO, "{zero}");
    }
}

#[test]
fn every_mistake_is_named_with_its_line() {
    let service = |rest: &str| format!("  - {{ {rest} }}");
    let kinds = "one of echo, discard, chargen, daytime";
    let cases: Vec<(String, Vec<String>)> = [
        // Syntax, and what YAML allows and a config does not.
        ("", "]", vec!["9: YAML: found misplaced bracket, expected valid YAML".to_owned()]),
        ("cluster", "cluster: &a demo", vec!["1: YAML: found an anchor, expected valid YAML".into()]),
        ("cluster", "cluster: !!str demo", vec!["1: YAML: found a tag, expected valid YAML".into()]),
        ("", "---\na: b", vec!["9: YAML: found a second document, expected valid YAML".into()]),
        ("", "[a]: b", vec!["9: YAML: found a key that is not a word, expected valid YAML".into()]),
        // Keys.
        ("cluster", "clutser: demo", vec![
            "1: clutser: found an unknown key, expected \"cluster\"".into(),
            "1: cluster: found nothing, expected a name of 1 to 64 characters".into(),
        ]),
        ("", "colour: red", vec![
            "9: colour: found an unknown key, expected one of cluster, interface, xdp, virtual_ip, nodes, key, key_file, tap, sync_interface, mirror_egress, protect, protect_timeout, sync_port, udp_replay, preempt, heartbeat, services, shadow, metrics, control".into(),
        ]),
        ("", "interface: eth1", vec!["9: interface: found the key a second time, after line 2, expected it once".into()]),
        ("heartbeat", "heartbeat: { interval: 10ms, missed: 3, leese: 20ms }", vec![
            "6: heartbeat.leese: found an unknown key, expected \"lease\"".into(),
        ]),
        // Names.
        ("cluster", "cluster: ''", vec!["1: cluster: found \"\", expected a name of 1 to 64 characters".into()]),
        ("cluster", "cluster:", vec!["1: cluster: found nothing, expected a name of 1 to 64 characters".into()]),
        ("interface", "interface: [eth0]", vec!["2: interface: found a list, expected an interface name of 1 to 15 characters like eth0".into()]),
        ("interface", "interface: sixteen-letters-", vec!["2: interface: found \"sixteen-letters-\", expected an interface name of 1 to 15 characters like eth0".into()]),
        ("interface", "interface: a/b", vec!["2: interface: found \"a/b\", expected an interface name of 1 to 15 characters like eth0".into()]),
        // Addresses.
        ("nodes", "nodes: [192.168.1.1, 192.168.1.1]", vec!["4: nodes[1]: found \"192.168.1.1\", expected two different nodes".into()]),
        ("nodes", "nodes: [192.168.1.1, 192.168.1.100]", vec!["4: nodes[1]: found \"192.168.1.100\", expected the node's own address, not the virtual IP".into()]),
        ("nodes", "nodes: [192.168.2.1, 192.168.1.255]", vec![
            "4: nodes[0]: found \"192.168.2.1\", expected a host address in the subnet of the virtual IP 192.168.1.100/24".into(),
            "4: nodes[1]: found \"192.168.1.255\", expected a host address in the subnet of the virtual IP 192.168.1.100/24".into(),
        ]),
        ("nodes", "nodes:\n  - 192.168.1.0\n  - host", vec![
            "5: nodes[0]: found \"192.168.1.0\", expected a host address in the subnet of the virtual IP 192.168.1.100/24".into(),
            "6: nodes[1]: found \"host\", expected an IPv4 address like 192.168.1.1".into(),
        ]),
        ("nodes", "nodes: [192.168.1.1]", vec!["4: nodes: found 1 node, expected the addresses of exactly two nodes like [192.168.1.1, 192.168.1.2]".into()]),
        ("nodes", "nodes: 192.168.1.1", vec!["4: nodes: found \"192.168.1.1\", expected the addresses of exactly two nodes like [192.168.1.1, 192.168.1.2]".into()]),
        // Key.
        ("key", "", vec!["1: key_file: found nothing, expected key_file (or, for demos, key) with 32 bytes or more".into()]),
        ("key", "key: hunter2", vec!["5: key: found a key of 7 bytes, expected 32 bytes or more".into()]),
        ("", "key_file: /nonexistent", vec!["9: key_file: found key and key_file together, expected exactly one of the two".into()]),
        ("key", "key_file: /nonexistent", vec!["5: key_file: found /nonexistent: No such file or directory (os error 2), expected a readable regular file of 32 to 4096 bytes, mode 0600".into()]),
        ("key", "key_file: /dev/null", vec!["5: key_file: found /dev/null: not a regular file, expected a readable regular file of 32 to 4096 bytes, mode 0600".into()]),
        // Tap and protection.
        ("", "xdp: generic", vec!["9: xdp: found \"generic\", expected auto, native or off".into()]),
        ("", "tap: mirror\nmirror_egress: headers", vec!["10: mirror_egress: found \"headers\", expected handshake or full (a frame is copied whole or not at all)".into()]),
        ("", "tap: mirror\nsync_interface: eth0", vec!["10: sync_interface: found \"eth0\", expected another interface than the one with the virtual IP".into()]),
        ("", "tap: mirror\nsync_interface: a/b", vec!["10: sync_interface: found \"a/b\", expected an interface name of 1 to 15 characters like eth0".into()]),
        ("", "sync_interface: eth1\ntap: lan", vec!["9: sync_interface: found \"eth1\", expected this key only beside tap: mirror".into()]),
        ("", "tap: lan\nmirror_egress: full", vec!["10: mirror_egress: found \"full\", expected this key only beside tap: mirror".into()]),
        ("", "protect: semisync", vec!["9: protect: found \"semisync\", expected async or sync".into()]),
        ("", "protect: sync\nprotect_timeout: 61s\nsync_port: 0", vec![
            "10: protect_timeout: found \"61s\", expected a duration like 30ms, from 1ms to 60s".into(),
            "11: sync_port: found \"0\", expected a port from 1 to 65535".into(),
        ]),
        ("", "protect: sync\nprotect_timeout: 999us\nsync_port: 65536", vec![
            "10: protect_timeout: found \"999us\", expected a duration like 30ms, from 1ms to 60s".into(),
            "11: sync_port: found \"65536\", expected a port from 1 to 65535".into(),
        ]),
        ("", "protect: async\nprotect_timeout: 30ms\nsync_port: 9501", vec![
            "10: protect_timeout: found \"30ms\", expected this key only beside protect: sync".into(),
            "11: sync_port: found \"9501\", expected this key only beside protect: sync".into(),
        ]),
        ("", "preempt: 999ms", vec!["9: preempt: found \"999ms\", expected a duration like 1m, from 1s to 24h; without the key it is never done".into()]),
        ("", "preempt: 0", vec!["9: preempt: found \"0\", expected a duration like 1m, from 1s to 24h; without the key it is never done".into()]),
        ("", "udp_replay: 1", vec!["9: udp_replay: found \"1\", expected a duration like 1s, at most 10s, or 0".into()]),
        ("", "udp_replay: 10001ms", vec!["9: udp_replay: found \"10001ms\", expected a duration like 1s, at most 10s, or 0".into()]),
        ("", "tap: hub", vec!["9: tap: found \"hub\", expected lan or mirror".into()]),
        // Heartbeat.
        ("heartbeat", "", vec!["1: heartbeat: found nothing, expected a map like { interval: 10ms, missed: 3 }".into()]),
        ("heartbeat", "heartbeat: { interval: 10, missed: 1 }", vec![
            "6: heartbeat.interval: found \"10\", expected a duration like 10ms, from 1ms to 10s".into(),
            "6: heartbeat.missed: found \"1\", expected a number from 2 to 100".into(),
        ]),
        ("heartbeat", "heartbeat:\n  interval: 999us\n  missed: 101", vec![
            "7: heartbeat.interval: found \"999us\", expected a duration like 10ms, from 1ms to 10s".into(),
            "8: heartbeat.missed: found \"101\", expected a number from 2 to 100".into(),
        ]),
        ("heartbeat", "heartbeat: { interval: 10ms, missed: 3, lease: 30ms }", vec!["6: heartbeat.lease: found \"30ms\", expected more than the interval 10ms, less than the takeover time 30ms (interval × missed)".into()]),
        ("heartbeat", "heartbeat: { interval: 10ms, missed: 3, lease: 10ms }", vec!["6: heartbeat.lease: found \"10ms\", expected more than the interval 10ms, less than the takeover time 30ms (interval × missed)".into()]),
        ("heartbeat", "heartbeat: { interval: 10ms, missed: 3, startup_grace: 29ms }", vec!["6: heartbeat.startup_grace: found \"29ms\", expected the takeover time 30ms (interval × missed) or more".into()]),
        // Services.
        ("- { name", "", vec!["7: services: found nothing, expected a list with at least one service like { name: echo, listen: tcp/7, handler: echo }".into()]),
        ("services", "services: []\nshadow:", vec![
            "7: services: found an empty list, expected a list with at least one service like { name: echo, listen: tcp/7, handler: echo }".into(),
            "9: shadow: found a list, expected a map with the keys max_flows, max_bytes, idle_timeout, ring_bytes".into(),
        ]),
        ("- { name", &service("name: Echo, listen: sctp/7, handler: ehco"), vec![
            "8: services[0].name: found \"Echo\", expected a name of 1 to 64 characters of a-z, 0-9 and -".into(),
            "8: services[0].listen: found \"sctp/7\", expected tcp/PORT or udp/PORT with a port from 1 to 65535".into(),
            format!("8: services[0].handler: found \"ehco\", expected {kinds}"),
        ]),
        ("- { name", &service("name: e, listen: tcp/0, handler: echo"), vec!["8: services[0].listen: found \"tcp/0\", expected tcp/PORT or udp/PORT with a port from 1 to 65535".into()]),
        ("- { name", &service("name: e, listen: tcp/65536, handler: echo"), vec!["8: services[0].listen: found \"tcp/65536\", expected tcp/PORT or udp/PORT with a port from 1 to 65535".into()]),
        ("- { name", &service("name: e, listen: tcp/+7, handler: echo"), vec!["8: services[0].listen: found \"tcp/+7\", expected tcp/PORT or udp/PORT with a port from 1 to 65535".into()]),
        ("", &service("name: echo, listen: udp/7, handler: echo"), vec!["9: services[1].name: found \"echo\", expected one that is not taken (see line 8)".into()]),
        ("", &service("name: e, listen: tcp/7, handler: echo"), vec!["9: services[1].listen: found \"tcp/7\", expected one that is not taken (see line 8)".into()]),
        ("", &service("name: e, listen: tcp/8"), vec![format!("9: services[1].handler: found nothing, expected {kinds}")]),
        ("", &service("name: e, listen: tcp/8, upstream: 127.0.0.1:1"), vec![format!("9: services[1].upstream: found \"127.0.0.1:1\", which is not supported yet, expected handler: {kinds}")]),
        ("", &service("name: e, listen: tcp/8, handler: echo, upstream: x"), vec!["9: services[1].upstream: found handler and upstream together, expected exactly one of the two".into()]),
        // Bounds.
        ("", "shadow: { max_flows: 0, max_bytes: 64, ring_bytes: 3MiB, idle_timeout: 0s }", vec![
            "9: shadow.max_flows: found \"0\", expected a number from 1 to 1000000".into(),
            "9: shadow.max_bytes: found \"64\", expected a size like 256MiB, from 1MiB to 1024GiB".into(),
            "9: shadow.idle_timeout: found \"0s\", expected a duration like 2h, from 1s to 365days".into(),
            "9: shadow.ring_bytes: found \"3MiB\", expected a size that is a power of two like 32MiB, from 64KiB to 1GiB".into(),
        ]),
        ("", "shadow: { ring_bytes: 2GiB }", vec!["9: shadow.ring_bytes: found \"2GiB\", expected a size that is a power of two like 32MiB, from 64KiB to 1GiB".into()]),
        ("", "metrics: { listen: localhost:9500 }", vec!["9: metrics.listen: found \"localhost:9500\", expected an address and a port like 0.0.0.0:9500".into()]),
        ("", "control: agent.sock", vec!["9: control: found \"agent.sock\", expected an absolute path of at most 107 bytes".into()]),
    ]
    .into_iter()
    .map(|(from, to, expected)| (with(from, to), expected))
    .collect();
    for (text, expected) in cases {
        let expected: Vec<_> = expected
            .into_iter()
            .map(|message| format!("config.yaml:{message}"))
            .collect();
        assert_eq!(messages(&text), expected, "{text}");
    }
}

#[test]
fn a_virtual_ip_must_be_a_host_address_with_a_subnet_for_three() {
    for bad in [
        "192.168.1.100",
        "192.168.1.100/0",
        "192.168.1.100/31",
        "192.168.1.100/33",
        "192.168.1.0/24",
        "192.168.1.255/24",
        "127.0.0.1/8",
        "224.0.0.18/24",
        "0.0.0.5/24",
        "255.255.255.254/24",
        "fe80::1/64",
        "192.168.1.100/+24",
    ] {
        let text = with("virtual_ip", &format!("virtual_ip: {bad}"));
        assert_eq!(
            messages(&text),
            [format!(
                "config.yaml:3: virtual_ip: found \"{bad}\", expected an IPv4 host address with its prefix length (1 to 30) like 192.168.1.100/24"
            )]
        );
    }
}

#[test]
fn all_mistakes_of_a_file_come_in_one_run_in_the_order_of_its_lines() {
    let text = "\
heartbeat: { interval: 10ms, missed: 1 }
cluster: demo
virtual_ip: 10.0.0.9
services:
  - { name: a, listen: tcp/7, handler: echo }
  - { name: a, listen: tcp/7, handler: echo, port: 8 }
";
    let lines: Vec<String> = messages(text)
        .iter()
        .map(|message| message.split(": ").take(2).collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(
        lines,
        [
            "config.yaml:1 interface",
            "config.yaml:1 nodes",
            "config.yaml:1 key_file",
            "config.yaml:1 heartbeat.missed",
            "config.yaml:3 virtual_ip",
            "config.yaml:6 services[1].port",
            "config.yaml:6 services[1].name",
            "config.yaml:6 services[1].listen",
        ]
    );
}

#[test]
fn a_file_that_cannot_be_read_is_one_error() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.yaml");
    let message = load(&missing).unwrap_err().to_string();
    assert_eq!(
        message,
        format!(
            "{}: found No such file or directory (os error 2), expected a readable YAML file in UTF-8 (name it with --config)",
            missing.display()
        )
    );
    assert!(load(directory.path()).is_err());
    let binary = directory.path().join("binary.yaml");
    std::fs::write(&binary, b"\xff\xfe").unwrap();
    assert!(load(&binary).is_err());
}

#[test]
fn a_key_file_is_read_without_its_newline_and_refused_when_others_can_read_it() {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("cluster.key");
    let file = directory.path().join("config.yaml");
    // Relative to the config file, not to where the agent was started.
    let text = with("key", "key_file: cluster.key");
    let key_of = |bytes: &[u8], mode: u32| {
        std::fs::write(&key, bytes).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
        parse(&text, &file).map(|config| config.key.0)
    };
    let secret = b"0123456789abcdef0123456789abcdef";
    for ending in ["", "\n", "\r\n"] {
        let bytes = [secret, ending.as_bytes()].concat();
        assert_eq!(key_of(&bytes, 0o600).unwrap(), secret);
    }
    assert_eq!(key_of(secret, 0o400).unwrap(), secret);

    let short = key_of(b"0123456789abcdef0123456789abcde\n", 0o600).unwrap_err();
    assert!(
        short
            .to_string()
            .contains("found a key of 31 bytes, expected 32 bytes or more")
    );
    let long = key_of(&[b'x'; 5000], 0o600).unwrap_err();
    assert!(long.to_string().contains("more than 4096 bytes"));
    for mode in [0o640, 0o604, 0o610] {
        let exposed = key_of(secret, mode).unwrap_err().to_string();
        let (key, file) = (key.display(), file.display());
        assert_eq!(
            exposed,
            format!(
                "{file}:5: key_file: found {key} with mode {mode:04o}, expected a key that only its owner can read: chmod 600 {key}"
            )
        );
    }
}

#[test]
fn a_key_is_never_printed() {
    let secret = "0123456789abcdef0123456789abcdef";
    let config = read(GOOD).unwrap();
    assert!(!format!("{config:?} {config}").contains(secret));
    let text = format!("{GOOD}key_file: [x]\nkey: {secret}\n");
    assert!(!messages(&text).join("\n").contains(secret));
}

proptest! {
    #[test]
    fn arbitrary_text_is_read_or_refused(text in "\\PC*") {
        let _ = read(&text);
    }

    #[test]
    fn arbitrary_yaml_like_text_is_read_or_refused(text in "[-a-z0-9 :,{}\\[\\]\n\t#&*!|>'\"%@`?~.]{0,200}") {
        let _ = read(&text);
    }

    /// The shipped file with bytes cut out, put in or swapped.
    #[test]
    fn a_damaged_config_is_read_or_refused(
        damages in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, "[-a-z0-9 :,{}\\[\\]\n\t#&*!|>'\"%.]{0,4}"), 1..6),
    ) {
        let mut text: Vec<char> = SHIPPED.chars().collect();
        for (at, cut, put) in damages {
            let start = at.index(text.len());
            let end = (start + cut).min(text.len());
            text.splice(start..end, put.chars());
        }
        match read(&text.iter().collect::<String>()) {
            Ok(config) => {
                prop_assert!(config.heartbeat.lease < config.heartbeat.takeover_time());
                prop_assert!(config.heartbeat.lease > config.heartbeat.interval);
                prop_assert!(config.key.0.len() >= 32);
            }
            Err(errors) => prop_assert!(!errors.0.is_empty()),
        }
    }
}
