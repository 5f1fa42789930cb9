//! Readers of what the kernel says, and of packets that anybody sends.

use super::choice;
use crate::conntrack::fuzzing as conntrack_readers;
use crate::netlink::{Attributes, Messages, fuzzing as netlink_readers};
use crate::tunnel::fuzzing as tunnel_readers;

/// Messages, attributes in attributes, and refusals.
pub fn netlink(input: &[u8]) {
    fn walk(attributes: Attributes<'_>, depth: usize) -> usize {
        let mut bytes = 0;
        for attribute in attributes {
            bytes += 4 + attribute.value.len();
            let _ = (
                attribute.u8(),
                attribute.be16(),
                attribute.be32(),
                attribute.be64(),
                attribute.text(),
            );
            if depth > 0 {
                assert!(walk(attribute.nested(), depth - 1) <= attribute.value.len());
            }
        }
        bytes
    }
    let mut bytes = 0;
    for message in Messages::new(input) {
        bytes += 16 + message.body.len();
        for fixed in [0, 4, 72] {
            assert!(walk(Attributes::after(message.body, fixed), 3) <= message.body.len());
        }
        netlink_readers::verdict(&message);
    }
    assert!(bytes <= input.len());
}

/// Answers of socket diagnosis.
pub fn sockets(input: &[u8]) {
    let (kind, bytes) = choice(input);
    for message in Messages::new(bytes) {
        netlink_readers::socket(kind & 1 == 0, &message);
    }
}

/// Entries of connection tracking, and what follows from them.
pub fn conntrack(input: &[u8]) {
    for message in Messages::new(input) {
        conntrack_readers::entry(&message);
    }
}

/// What is told about packets that wait in a queue.
pub fn queue(input: &[u8]) {
    for message in Messages::new(input) {
        conntrack_readers::notice(&message);
    }
}

/// Packets that are put together and cut apart.
pub fn packets(input: &[u8]) {
    let (how, bytes) = choice(input);
    tunnel_readers::packets(how, bytes);
}
