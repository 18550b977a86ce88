//! A LAN in a box, and the tools to watch what RFSIS does to it. Needs root.
//!
//! [`Lab`] is two nodes, a client and a bridge, each in an anonymous network namespace
//! ([`netns`]); [`Agent`] is a running `rfsis-agent` on a node; [`client`] types and transfers like
//! a client would; [`capture`] and [`wire`] see and send frames. All of it goes away with the
//! process that made it, however that ends.

pub mod agent;
pub mod busy;
pub mod capture;
pub mod churn;
pub mod client;
pub mod cluster;
pub mod faults;
pub mod flood;
pub mod forge;
pub mod inside;
pub mod interrupt;
pub mod lab;
pub mod metrics;
pub mod netns;
pub mod patience;
pub mod pulse;
pub mod report;
pub mod wire;
pub mod wiring;

pub use agent::{Agent, Death, Pair, Settings, Tap};
pub use capture::{Capture, Trace};
pub use client::Typist;
pub use cluster::{Cluster, Failover};
pub use faults::{Fault, Traffic};
pub use lab::{Bridge, Host, Lab, LabOptions, VIP};
pub use wiring::Wiring;
