//! The devices of `ringvm_backends` in processes of their own, over vhost-user.
//!
//! Nothing is served from here yet: the crate holds the place, and the arrow `vhost-daemons -> backends`, that
//! `ringvm-blk` and `ringvm-net` will take.
