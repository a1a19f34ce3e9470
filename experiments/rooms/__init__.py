"""Rooms: furnished rooms with exact labels, rendered from openly licensed furniture.

Each module is one noun of the sentence "the *catalog*'s *models* furnish a *room* whose *surfaces* are
painted, a *view* of it is *rendered* and the set is *packed* and drawn on a *sheet*".
"""
