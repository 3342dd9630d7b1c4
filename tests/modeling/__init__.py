"""Tests of how data, backbone and head go together."""
