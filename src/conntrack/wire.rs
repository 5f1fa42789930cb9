//! Numbers of the kernel's interface, named as in its headers.

#![allow(
    dead_code,
    reason = "whole enumerations are easier to check against the headers"
)]

/// `NFNL_SUBSYS_*` of `linux/netfilter/nfnetlink.h`, shifted to where a message type has them.
pub const CTNETLINK: u16 = 1 << 8;
pub const QUEUE: u16 = 3 << 8;
pub const NFTABLES: u16 = 10 << 8;
/// `NFNL_SUBSYS_NFTABLES` as the resource of a batch.
pub const SUBSYS_NFTABLES: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`, `NFNL_BATCH_GENID`.
pub const BATCH_BEGIN: u16 = 0x10;
pub const BATCH_END: u16 = 0x11;
pub const BATCH_GENID: u16 = 1;

/// `enum cntl_msg_types` of `linux/netfilter/nfnetlink_conntrack.h`.
pub const CT_NEW: u16 = CTNETLINK;
pub const CT_GET: u16 = CTNETLINK | 1;
pub const CT_DELETE: u16 = CTNETLINK | 2;

/// `enum nfnetlink_groups` of `linux/netfilter/nfnetlink.h`.
pub const GROUP_CONNTRACK_NEW: u32 = 1;
pub const GROUP_CONNTRACK_UPDATE: u32 = 2;
pub const GROUP_CONNTRACK_DESTROY: u32 = 3;

/// `enum ctattr_type`.
pub mod cta {
    pub const TUPLE_ORIG: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOINFO: u16 = 4;
    pub const NAT_SRC: u16 = 6;
    pub const TIMEOUT: u16 = 7;
    pub const MARK: u16 = 8;
    pub const COUNTERS_ORIG: u16 = 9;
    pub const COUNTERS_REPLY: u16 = 10;
    pub const ID: u16 = 12;
    pub const NAT_DST: u16 = 13;
    pub const ZONE: u16 = 18;
    pub const MARK_MASK: u16 = 21;
    pub const FILTER: u16 = 25;
}

/// `enum ctattr_filter`, and `CTA_FILTER_F_CTA_IP_SRC` of
/// `net/netfilter/nf_conntrack_netlink.c`.
pub mod filter {
    pub const ORIG_FLAGS: u16 = 1;
    pub const REPLY_FLAGS: u16 = 2;
    pub const F_IP_SRC: u32 = 1;
}

/// `enum ctattr_tuple`.
pub mod tuple {
    pub const IP: u16 = 1;
    pub const PROTO: u16 = 2;
    pub const ZONE: u16 = 3;
}

/// `enum ctattr_ip`.
pub mod ip {
    pub const V4_SRC: u16 = 1;
    pub const V4_DST: u16 = 2;
    pub const V6_SRC: u16 = 3;
    pub const V6_DST: u16 = 4;
}

/// `enum ctattr_l4proto`.
pub mod proto {
    pub const NUM: u16 = 1;
    pub const SRC_PORT: u16 = 2;
    pub const DST_PORT: u16 = 3;
    pub const ICMP_ID: u16 = 4;
    pub const ICMP_TYPE: u16 = 5;
    pub const ICMP_CODE: u16 = 6;
    pub const ICMPV6_ID: u16 = 7;
    pub const ICMPV6_TYPE: u16 = 8;
    pub const ICMPV6_CODE: u16 = 9;
}

/// `enum ctattr_protoinfo`, `enum ctattr_protoinfo_tcp`, `enum ctattr_protoinfo_sctp`.
pub mod protoinfo {
    pub const TCP: u16 = 1;
    pub const SCTP: u16 = 3;
    pub const TCP_STATE: u16 = 1;
    pub const TCP_WSCALE_ORIGINAL: u16 = 2;
    pub const TCP_WSCALE_REPLY: u16 = 3;
    pub const TCP_FLAGS_ORIGINAL: u16 = 4;
    pub const TCP_FLAGS_REPLY: u16 = 5;
    pub const SCTP_STATE: u16 = 1;
    pub const SCTP_VTAG_ORIGINAL: u16 = 2;
    pub const SCTP_VTAG_REPLY: u16 = 3;
}

/// `enum ctattr_nat`, `enum ctattr_protonat`.
pub mod nat {
    pub const V4_MINIP: u16 = 1;
    pub const V4_MAXIP: u16 = 2;
    pub const PROTO: u16 = 3;
    pub const V6_MINIP: u16 = 4;
    pub const V6_MAXIP: u16 = 5;
    pub const PORT_MIN: u16 = 1;
    pub const PORT_MAX: u16 = 2;
}

/// `enum ctattr_counters`.
pub mod counters {
    pub const PACKETS: u16 = 1;
    pub const BYTES: u16 = 2;
}

/// `enum nfqnl_msg_types` of `linux/netfilter/nfnetlink_queue.h`.
pub const QUEUE_PACKET: u16 = QUEUE;
pub const QUEUE_VERDICT: u16 = QUEUE | 1;
pub const QUEUE_CONFIG: u16 = QUEUE | 2;
pub const QUEUE_VERDICT_BATCH: u16 = QUEUE | 3;

/// `enum nfqnl_attr_type`.
pub mod nfqa {
    pub const PACKET_HDR: u16 = 1;
    pub const VERDICT_HDR: u16 = 2;
    pub const IFINDEX_INDEV: u16 = 5;
    pub const PAYLOAD: u16 = 10;
    pub const CAP_LEN: u16 = 13;
    pub const SKB_INFO: u16 = 14;
    /// A flag in `SKB_INFO`.
    pub const SKB_GSO: u32 = 1 << 1;
}

/// `enum nfqnl_attr_config` and what belongs to it.
pub mod nfqa_cfg {
    pub const CMD: u16 = 1;
    pub const PARAMS: u16 = 2;
    pub const QUEUE_MAXLEN: u16 = 3;
    pub const MASK: u16 = 4;
    pub const FLAGS: u16 = 5;
    pub const CMD_NONE: u8 = 0;
    pub const CMD_BIND: u8 = 1;
    pub const CMD_UNBIND: u8 = 2;
    pub const COPY_META: u8 = 1;
    pub const COPY_PACKET: u8 = 2;
    pub const F_FAIL_OPEN: u32 = 1;
    pub const F_GSO: u32 = 1 << 2;
}

/// Verdicts of `linux/netfilter.h`.
pub const NF_DROP: u32 = 0;
pub const NF_ACCEPT: u32 = 1;

/// `enum nf_tables_msg_types` of `linux/netfilter/nf_tables.h`.
pub mod nft {
    use super::NFTABLES;
    pub const DELTABLE: u16 = NFTABLES | 2;
    pub const GETCHAIN: u16 = NFTABLES | 4;
    pub const DELCHAIN: u16 = NFTABLES | 5;
    pub const NEWRULE: u16 = NFTABLES | 6;
    pub const GETRULE: u16 = NFTABLES | 7;
    pub const DELRULE: u16 = NFTABLES | 8;
    pub const DELSET: u16 = NFTABLES | 11;
    pub const NEWSETELEM: u16 = NFTABLES | 12;
    pub const GETSETELEM: u16 = NFTABLES | 13;
    pub const DELSETELEM: u16 = NFTABLES | 14;
    pub const GETGEN: u16 = NFTABLES | 16;

    /// `NFTA_TABLE_NAME`.
    pub const TABLE_NAME: u16 = 1;
    /// `NFTA_CHAIN_TABLE`, `NFTA_CHAIN_NAME`.
    pub const CHAIN_TABLE: u16 = 1;
    pub const CHAIN_NAME: u16 = 3;
    /// `NFTA_RULE_TABLE`, `_CHAIN`, `_HANDLE`, `_EXPRESSIONS`, `_USERDATA`.
    pub const RULE_TABLE: u16 = 1;
    pub const RULE_CHAIN: u16 = 2;
    pub const RULE_HANDLE: u16 = 3;
    pub const RULE_EXPRESSIONS: u16 = 4;
    pub const RULE_USERDATA: u16 = 7;
    /// `NFTA_SET_TABLE`, `NFTA_SET_NAME`.
    pub const SET_TABLE: u16 = 1;
    pub const SET_NAME: u16 = 2;
    /// `NFTA_SET_ELEM_LIST_TABLE`, `_SET`, `_ELEMENTS`.
    pub const ELEMENTS_TABLE: u16 = 1;
    pub const ELEMENTS_SET: u16 = 2;
    pub const ELEMENTS: u16 = 3;
    /// `NFTA_SET_ELEM_KEY`, `_DATA`; `NFTA_DATA_VALUE`.
    pub const ELEMENT_KEY: u16 = 1;
    pub const ELEMENT_DATA: u16 = 2;
    pub const DATA_VALUE: u16 = 1;
    /// `NFTA_LIST_ELEM`, `NFTA_EXPR_NAME`, `NFTA_EXPR_DATA`.
    pub const LIST_ELEM: u16 = 1;
    pub const EXPR_NAME: u16 = 1;
    pub const EXPR_DATA: u16 = 2;
    /// `NFTA_TARGET_*` of `linux/netfilter/nf_tables_compat.h`.
    pub const TARGET_NAME: u16 = 1;
    pub const TARGET_REV: u16 = 2;
    pub const TARGET_INFO: u16 = 3;
    /// `NFTA_IMMEDIATE_DREG`, `_DATA`; `NFTA_DATA_VERDICT`; `NFTA_VERDICT_CODE`, `_CHAIN`.
    pub const IMMEDIATE_REGISTER: u16 = 1;
    pub const IMMEDIATE_DATA: u16 = 2;
    pub const DATA_VERDICT: u16 = 2;
    pub const VERDICT_CODE: u16 = 1;
    pub const VERDICT_CHAIN: u16 = 2;
    /// `NFT_REG_VERDICT` of `enum nft_registers`, `NFT_JUMP` of `enum nft_verdicts`.
    pub const REGISTER_VERDICT: u32 = 0;
    pub const JUMP: i32 = -3;
    /// `NFTA_QUEUE_*`.
    pub const QUEUE_NUM: u16 = 1;
    pub const QUEUE_TOTAL: u16 = 2;
    pub const QUEUE_FLAGS: u16 = 3;
    /// `NFT_QUEUE_FLAG_BYPASS`, and `NFQ_FLAG_BYPASS` of `linux/netfilter/xt_NFQUEUE.h`.
    pub const FLAG_BYPASS: u16 = 1;
    /// `NFTA_GEN_ID`.
    pub const GEN_ID: u16 = 1;
}

/// `NFPROTO_INET`, the family of a table for IPv4 and IPv6.
pub const NFPROTO_INET: u8 = 1;
pub const AF_UNSPEC: u8 = 0;
pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;
