//! Layout of a heartbeat: an Ethernet ARP packet followed by an authenticated trailer.
//!
//! ```text
//!  0              14                  42                                  138
//!  ┌──────────────┬───────────────────┬────────────────────────────────────┐
//!  │ Ethernet 14  │ ARP packet 28     │ trailer 96                         │
//!  └──────────────┴───────────────────┴────────────────────────────────────┘
//!                                     │
//!   trailer offset  size  field       ▼                     all big-endian
//!     0              4    magic "RFSI"
//!     4              1    version (3)
//!     5              1    state (`maps::State`)
//!     6              1    role (0 primary, 1 backup)
//!     7              1    wish of a standby: 0 none, 1 asks for the VIP, 2 insists
//!     8              8    cluster id: first 8 bytes of SHA-256(cluster name)
//!    16              4    node id: IPv4 address of the sender
//!    20              4    flows that a takeover by the standby would lose
//!    24              8    epoch
//!    32              8    session: random at each start of the agent
//!    40              8    sequence: 1, 2, 3 … within the session
//!    48              8    send time, ns, the sender's CLOCK_MONOTONIC
//!    56              8    echo: session of the peer's last heartbeat, 0 if none
//!    64              8    echo: sequence of the peer's last heartbeat
//!    72              6    tap: hardware address that sends and takes copies of the VIP's frames
//!    78              1    objection of an active to a wish, 0 if none
//!    79              1    reserved, 0
//!    80             16    HMAC-SHA256 over the ARP header and trailer[0..80], truncated
//! ```
//!
//! The MAC covers the ARP header, so the sender's hardware address is authenticated too.

/// First bytes of the trailer.
pub const MAGIC: [u8; 4] = *b"RFSI";
/// Version of the trailer that this build speaks.
pub const VERSION: u8 = 3;
/// Length of an Ethernet header without VLAN tag, bytes.
pub const ETHERNET_LEN: usize = 14;
/// Length of an Ethernet/IPv4 ARP packet (RFC 826), bytes.
pub const ARP_LEN: usize = 28;
/// Length of the trailer, bytes.
pub const TRAILER_LEN: usize = 96;
/// Length of the truncated MAC that ends the trailer, bytes.
pub const MAC_LEN: usize = 16;
/// Length of a whole heartbeat frame, bytes.
pub const FRAME_LEN: usize = ETHERNET_LEN + ARP_LEN + TRAILER_LEN;
