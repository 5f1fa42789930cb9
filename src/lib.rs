//! livemig moves a running Podman container to another Linux host while its TCP and UDP peers go
//! on talking to it.

pub mod agent;
pub mod bundle;
pub mod conntrack;
pub mod criu;
pub mod netlink;
pub mod podman;
pub mod tunnel;
