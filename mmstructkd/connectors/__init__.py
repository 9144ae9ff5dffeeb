"""Connectors: trained modules that make a student's tensor comparable."""

from mmstructkd.connectors.conv import ConvConnector

__all__ = ['ConvConnector']
